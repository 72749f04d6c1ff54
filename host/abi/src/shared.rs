//! What all workers of a process share: data with compare-and-swap, queues, metrics.
//!
//! Names of data and queues belong to a `vm_id`, as in Envoy; metrics are the whole process's. Everything here is
//! bounded, since shared data knows no deletion and a guest decides on the names.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;

use crate::abi::Status;

/// Bounds on what the guests of one `vm_id` can make the process keep. Others' room is not theirs to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedLimits {
    /// Keys of shared data. Default 65,536: there is no way to delete one.
    pub entries_max: usize,
    /// Bytes of shared keys and values. Default 64 MiB.
    pub bytes_max: usize,
    /// Queues. Default 100: a queue is a way between two plugins, of which a policy has some dozens.
    pub queues_max: usize,
    /// Items waiting in one queue. Default 1,024: who does not keep up with so many does not keep up.
    pub queue_items_max: usize,
    /// Bytes of the items in all queues. Default 64 MiB.
    pub queue_bytes_max: usize,
}

impl Default for SharedLimits {
    fn default() -> SharedLimits {
        SharedLimits {
            entries_max: 65_536,
            bytes_max: 64 * 1024 * 1024,
            queues_max: 100,
            queue_items_max: 1_024,
            queue_bytes_max: 64 * 1024 * 1024,
        }
    }
}

impl SharedLimits {
    /// The larger of both in each: what plugins get that share a `vm_id`.
    pub(crate) fn or_larger(self, other: SharedLimits) -> SharedLimits {
        SharedLimits {
            entries_max: self.entries_max.max(other.entries_max),
            bytes_max: self.bytes_max.max(other.bytes_max),
            queues_max: self.queues_max.max(other.queues_max),
            queue_items_max: self.queue_items_max.max(other.queue_items_max),
            queue_bytes_max: self.queue_bytes_max.max(other.queue_bytes_max),
        }
    }
}

/// Bytes of a queue's or a metric's name.
pub(crate) const NAME_BYTES_MAX: usize = 1024;

/// Shared data, queues and metrics of one process.
#[derive(Default)]
pub struct Shared {
    data: Mutex<Data>,
    queues: Mutex<Queues>,
    metrics: RwLock<Metrics>,
    /// By worker id; a worker that ends takes its mailbox away.
    mailboxes: Mutex<HashMap<u64, Arc<Mailbox>>>,
    workers: AtomicU64,
}

#[derive(Default)]
struct Data {
    /// By `vm_id`.
    spaces: HashMap<Box<str>, DataSpace>,
    cas: u32,
}

/// What the guests of one `vm_id` share.
#[derive(Default)]
struct DataSpace {
    limits: SharedLimits,
    entries: HashMap<Box<[u8]>, Entry>,
    bytes: usize,
}

struct Entry {
    /// Counted, so that the lock is held for a reference and not for a copy: a value may have many megabytes.
    value: Bytes,
    cas: u32,
}

#[derive(Default)]
struct Queues {
    /// By `vm_id`.
    spaces: HashMap<Box<str>, QueueSpace>,
    queues: BTreeMap<u32, Queue>,
}

/// The queues of one `vm_id`.
#[derive(Default)]
struct QueueSpace {
    limits: SharedLimits,
    ids: HashMap<Box<[u8]>, u32>,
    bytes: usize,
}

struct Queue {
    vm_id: Box<str>,
    items: VecDeque<Vec<u8>>,
    /// Whom to tell of new items: the context that registered last.
    owner: Owner,
}

/// A root context of one worker's VM, as a queue's owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) worker: u64,
    pub(crate) vm: u64,
    pub(crate) context: u32,
}

/// That a queue got an item, for its owner.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notification {
    pub(crate) owner: Owner,
    pub(crate) queue: u32,
}

/// Wakes the thread of a worker, from any thread.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Notifications on their way to one worker.
#[derive(Default)]
pub(crate) struct Mailbox {
    waiting: Mutex<Waiting>,
    waker: Mutex<Option<Waker>>,
}

#[derive(Default)]
struct Waiting {
    notifications: VecDeque<Notification>,
    by_queue: HashMap<u32, usize>,
}

impl Mailbox {
    pub(crate) fn set_waker(&self, waker: Waker) {
        *lock(&self.waker) = Some(waker);
        // What came before there was anybody to wake.
        if self.len() > 0 {
            self.wake();
        }
    }

    /// How many wait now.
    pub(crate) fn len(&self) -> usize {
        lock(&self.waiting).notifications.len()
    }

    pub(crate) fn take_one(&self) -> Option<Notification> {
        let mut waiting = lock(&self.waiting);
        let notification = waiting.notifications.pop_front()?;
        if let Some(count) = waiting.by_queue.get_mut(&notification.queue) {
            *count = count.saturating_sub(1);
        }
        Some(notification)
    }

    /// Wakes the worker.
    pub(crate) fn wake(&self) {
        if let Some(wake) = lock(&self.waker).clone() {
            wake();
        }
    }

    /// One for each item, and no more of a queue than it can hold items: a worker that never runs does not grow this, and who fills
    /// one queue keeps nobody from hearing of another.
    fn post(&self, notification: Notification, most: usize) {
        let mut waiting = lock(&self.waiting);
        let count = waiting.by_queue.entry(notification.queue).or_default();
        if *count < most {
            *count += 1;
            waiting.notifications.push_back(notification);
        }
        drop(waiting);
        self.wake();
    }
}

/// A lock that a panicking thread left is taken over: no code in here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a metric measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricKind {
    /// Grows only.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Distribution of values.
    Histogram,
}

/// A metric's value at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricValue {
    /// Of a counter or a gauge.
    Number(u64),
    /// Of a histogram.
    Histogram {
        /// Values recorded.
        count: u64,
        /// Their sum.
        sum: u64,
        /// For each bound, how many values were at most that large; the last bound is `u64::MAX`.
        buckets: Vec<(u64, u64)>,
    },
}

/// A metric that a guest defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    /// Name as the guest gave it.
    pub name: String,
    /// What it measures.
    pub kind: MetricKind,
    /// What it says now.
    pub value: MetricValue,
}

#[derive(Default)]
struct Metrics {
    by_name: BTreeMap<(String, u8), Arc<MetricCell>>,
    /// How many names each plugin has brought in, over all its VMs: what replaces a crashed one starts with none of its own,
    /// but the names it had are still here.
    by_plugin: HashMap<String, usize>,
}

/// Upper bounds of a histogram's buckets: Envoy's defaults.
const BUCKETS: [u64; 20] = [
    1,
    5,
    10,
    25,
    50,
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    30_000,
    60_000,
    300_000,
    600_000,
    1_800_000,
    3_600_000,
    86_400_000,
    u64::MAX,
];

/// One metric's storage, shared by all VMs that defined it.
#[derive(Debug)]
pub(crate) struct MetricCell {
    kind: MetricKind,
    value: AtomicU64,
    histogram: Option<Box<HistogramCell>>,
}

#[derive(Debug, Default)]
struct HistogramCell {
    count: AtomicU64,
    sum: AtomicU64,
    buckets: [AtomicU64; BUCKETS.len()],
}

impl MetricCell {
    fn new(kind: MetricKind) -> MetricCell {
        let histogram = (kind == MetricKind::Histogram).then(Box::default);
        MetricCell { kind, value: AtomicU64::new(0), histogram }
    }

    /// A counter takes only positive offsets, a histogram none.
    pub(crate) fn increment(&self, offset: i64) -> Status {
        match self.kind {
            MetricKind::Counter if offset > 0 => {
                self.value.fetch_add(offset as u64, Ordering::Relaxed);
                Status::Ok
            }
            MetricKind::Gauge => {
                self.value.fetch_add(offset as u64, Ordering::Relaxed);
                Status::Ok
            }
            MetricKind::Counter | MetricKind::Histogram => Status::BadArgument,
        }
    }

    /// Sets a gauge, records into a histogram and, as Envoy does, adds to a counter.
    pub(crate) fn record(&self, value: u64) {
        match (&self.kind, &self.histogram) {
            (MetricKind::Counter, _) => {
                self.value.fetch_add(value, Ordering::Relaxed);
            }
            (_, Some(histogram)) => {
                histogram.count.fetch_add(1, Ordering::Relaxed);
                histogram.sum.fetch_add(value, Ordering::Relaxed);
                let bucket = BUCKETS.partition_point(|bound| *bound < value);
                histogram.buckets[bucket].fetch_add(1, Ordering::Relaxed);
            }
            (_, None) => self.value.store(value, Ordering::Relaxed),
        }
    }

    /// The number of a counter or gauge; a histogram has none.
    pub(crate) fn number(&self) -> Option<u64> {
        (self.kind != MetricKind::Histogram).then(|| self.value.load(Ordering::Relaxed))
    }

    fn value(&self) -> MetricValue {
        match &self.histogram {
            None => MetricValue::Number(self.value.load(Ordering::Relaxed)),
            Some(histogram) => {
                let mut total = 0;
                let buckets = BUCKETS.iter().zip(&histogram.buckets).map(|(bound, cell)| {
                    total += cell.load(Ordering::Relaxed);
                    (*bound, total)
                });
                MetricValue::Histogram {
                    buckets: buckets.collect(),
                    count: histogram.count.load(Ordering::Relaxed),
                    sum: histogram.sum.load(Ordering::Relaxed),
                }
            }
        }
    }
}

impl Shared {
    /// An empty store.
    pub fn new() -> Arc<Shared> {
        Arc::default()
    }

    /// Sets what the guests of a `vm_id` may keep from now on. What is above it already stays.
    pub(crate) fn set_limits(&self, vm_id: &str, limits: SharedLimits) {
        lock(&self.data).spaces.entry(vm_id.into()).or_default().limits = limits;
        lock(&self.queues).spaces.entry(vm_id.into()).or_default().limits = limits;
    }

    /// All metrics that guests have defined, by name.
    pub fn metrics(&self) -> Vec<Metric> {
        let metrics = self.metrics.read().unwrap_or_else(PoisonError::into_inner);
        metrics
            .by_name
            .iter()
            .map(|((name, _), cell)| Metric { name: name.clone(), kind: cell.kind, value: cell.value() })
            .collect()
    }

    /// The value that guests of this `vm_id` share under `key`.
    pub fn data(&self, vm_id: &str, key: &[u8]) -> Option<Vec<u8>> {
        self.get_data(vm_id, key).map(|(value, _)| value.to_vec())
    }

    /// All that guests of this `vm_id` share, by key.
    pub fn all_data(&self, vm_id: &str) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let data = lock(&self.data);
        let entries = data.spaces.get(vm_id).into_iter().flat_map(|space| &space.entries);
        entries.map(|(key, entry)| (key.to_vec(), entry.value.to_vec())).collect()
    }

    /// Shares a value as a guest would, whatever is there. `false`: the limits do not allow it.
    pub fn put_data(&self, vm_id: &str, key: &[u8], value: &[u8]) -> bool {
        self.set_data(vm_id, key, value, 0) == Status::Ok
    }

    /// What waits in a queue, oldest first; `None` if no guest has registered it.
    pub fn queued(&self, vm_id: &str, name: &[u8]) -> Option<Vec<Vec<u8>>> {
        let queues = lock(&self.queues);
        let id = queues.spaces.get(vm_id)?.ids.get(name)?;
        Some(queues.queues.get(id)?.items.iter().cloned().collect())
    }

    /// Puts an item into a queue as a guest would. `false`: no guest has registered it, or the limits do not allow it.
    pub fn put_queued(&self, vm_id: &str, name: &[u8], item: &[u8]) -> bool {
        self.resolve_queue(vm_id, name).is_some_and(|id| self.enqueue(id, item) == Status::Ok)
    }

    /// A number and a mailbox for a new worker.
    pub(crate) fn add_worker(&self) -> (u64, Arc<Mailbox>) {
        let id = self.workers.fetch_add(1, Ordering::Relaxed) + 1;
        let mailbox = Arc::new(Mailbox::default());
        lock(&self.mailboxes).insert(id, Arc::clone(&mailbox));
        (id, mailbox)
    }

    pub(crate) fn remove_worker(&self, id: u64) {
        lock(&self.mailboxes).remove(&id);
    }

    /// The metric of this name, made if there is none and the plugin has not yet brought in `most`.
    pub(crate) fn define_metric(
        &self,
        plugin: &str,
        most: usize,
        kind: MetricKind,
        name: &str,
    ) -> Option<Arc<MetricCell>> {
        let mut metrics = self.metrics.write().unwrap_or_else(PoisonError::into_inner);
        let Metrics { by_name, by_plugin } = &mut *metrics;
        let key = (name.to_owned(), kind as u8);
        if let Some(cell) = by_name.get(&key) {
            return Some(Arc::clone(cell));
        }
        let count = by_plugin.entry(plugin.to_owned()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        let cell = Arc::new(MetricCell::new(kind));
        by_name.insert(key, Arc::clone(&cell));
        Some(cell)
    }

    /// The value and its compare-and-swap number, which is never 0.
    pub(crate) fn get_data(&self, vm_id: &str, key: &[u8]) -> Option<(Bytes, u32)> {
        let data = lock(&self.data);
        let entry = data.spaces.get(vm_id)?.entries.get(key)?;
        Some((entry.value.clone(), entry.cas))
    }

    pub(crate) fn set_data(&self, vm_id: &str, key: &[u8], value: &[u8], cas: u32) -> Status {
        // Copied without the lock, and before anything is known of limits: a guest's memory is bounded.
        let value = Bytes::copy_from_slice(value);
        let data = &mut *lock(&self.data);
        let space = data.spaces.entry(vm_id.into()).or_default();
        let (entries_max, bytes_max) = (space.limits.entries_max, space.limits.bytes_max);
        let old = space.entries.get(key);
        if cas != 0 && old.is_some_and(|entry| entry.cas != cas) {
            return Status::CasMismatch;
        }
        let bytes = match old {
            Some(entry) => space.bytes - entry.value.len() + value.len(),
            None if space.entries.len() >= entries_max => return Status::InternalFailure,
            None => space.bytes + key.len() + value.len(),
        };
        // A value that makes things no worse may also be set where a lower limit came into force.
        if bytes > bytes_max && bytes > space.bytes {
            return Status::InternalFailure;
        }
        // Never 0: to a guest 0 means "whatever is there".
        data.cas = data.cas.checked_add(1).unwrap_or(1);
        space.bytes = bytes;
        let entry = Entry { value, cas: data.cas };
        match space.entries.get_mut(key) {
            Some(old) => *old = entry,
            None => {
                space.entries.insert(key.into(), entry);
            }
        }
        Status::Ok
    }

    /// Registers a queue or moves its notifications to a new owner; what waits in it stays.
    pub(crate) fn register_queue(&self, vm_id: &str, name: &[u8], owner: Owner) -> Option<u32> {
        let Queues { spaces, queues } = &mut *lock(&self.queues);
        let space = spaces.entry(vm_id.into()).or_default();
        if let Some(id) = space.ids.get(name) {
            if let Some(queue) = queues.get_mut(id) {
                queue.owner = owner;
            }
            return Some(*id);
        }
        if name.len() > NAME_BYTES_MAX || space.ids.len() >= space.limits.queues_max {
            return None;
        }
        let id = queues.len() as u32 + 1;
        space.ids.insert(name.into(), id);
        queues.insert(id, Queue { vm_id: vm_id.into(), items: VecDeque::new(), owner });
        Some(id)
    }

    pub(crate) fn resolve_queue(&self, vm_id: &str, name: &[u8]) -> Option<u32> {
        lock(&self.queues).spaces.get(vm_id)?.ids.get(name).copied()
    }

    pub(crate) fn enqueue(&self, id: u32, item: &[u8]) -> Status {
        let item = item.to_vec();
        let mut held = lock(&self.queues);
        let Queues { spaces, queues } = &mut *held;
        let Some(queue) = queues.get_mut(&id) else { return Status::NotFound };
        let Some(space) = spaces.get_mut(&queue.vm_id) else { return Status::NotFound };
        let (bytes, items_max) = (space.bytes + item.len(), space.limits.queue_items_max);
        if queue.items.len() >= items_max || bytes > space.limits.queue_bytes_max {
            return Status::InternalFailure;
        }
        space.bytes = bytes;
        queue.items.push_back(item);
        let owner = queue.owner;
        drop(held);
        let mailbox = lock(&self.mailboxes).get(&owner.worker).cloned();
        if let Some(mailbox) = mailbox {
            mailbox.post(Notification { owner, queue: id }, items_max);
        }
        Status::Ok
    }

    pub(crate) fn dequeue(&self, id: u32) -> Result<Vec<u8>, Status> {
        let Queues { spaces, queues } = &mut *lock(&self.queues);
        let queue = queues.get_mut(&id).ok_or(Status::NotFound)?;
        let item = queue.items.pop_front().ok_or(Status::Empty)?;
        if let Some(space) = spaces.get_mut(&queue.vm_id) {
            space.bytes -= item.len();
        }
        Ok(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store in which these limits hold for two `vm_id`s.
    fn limited(limits: SharedLimits) -> Arc<Shared> {
        let shared = Shared::new();
        shared.set_limits("", limits);
        shared.set_limits("vm", limits);
        shared
    }

    fn get(shared: &Shared, vm_id: &str, key: &[u8]) -> Option<(Vec<u8>, u32)> {
        shared.get_data(vm_id, key).map(|(value, cas)| (value.to_vec(), cas))
    }

    #[test]
    fn compare_and_swap_refuses_a_stale_number() {
        let shared = limited(SharedLimits::default());
        assert_eq!(shared.set_data("vm", b"k", b"1", 77), Status::Ok, "an absent key takes any number");
        let (_, cas) = get(&shared, "vm", b"k").unwrap();
        assert_ne!(cas, 0);
        assert_eq!(shared.set_data("vm", b"k", b"2", cas), Status::Ok);
        assert_eq!(shared.set_data("vm", b"k", b"3", cas), Status::CasMismatch);
        assert_eq!(shared.set_data("vm", b"k", b"4", 0), Status::Ok, "0 means whatever is there");
        assert_eq!(get(&shared, "vm", b"k").unwrap().0, b"4");
        assert_eq!(get(&shared, "other", b"k"), None, "names belong to a vm_id");
    }

    #[test]
    fn data_is_bounded_in_entries_and_bytes() {
        let shared = limited(SharedLimits { entries_max: 2, bytes_max: 20, ..SharedLimits::default() });
        assert_eq!(shared.set_data("", b"a", b"12", 0), Status::Ok);
        assert_eq!(shared.set_data("", b"b", b"12", 0), Status::Ok);
        assert_eq!(shared.set_data("", b"c", b"", 0), Status::InternalFailure);
        assert_eq!(shared.set_data("", b"b", &[0; 16], 0), Status::Ok);
        assert_eq!(shared.set_data("", b"b", &[0; 17], 0), Status::InternalFailure);
        assert_eq!(get(&shared, "", b"b").unwrap().0, [0; 16], "a refused value changes nothing");
    }

    #[test]
    fn one_vm_ids_data_takes_no_room_from_anothers() {
        let shared = limited(SharedLimits { entries_max: 1, bytes_max: 4, ..SharedLimits::default() });
        assert_eq!(shared.set_data("vm", b"k", b"123", 0), Status::Ok);
        assert_eq!(shared.set_data("vm", b"l", b"", 0), Status::InternalFailure);
        assert_eq!(shared.set_data("", b"k", b"123", 0), Status::Ok);
    }

    #[test]
    fn under_a_lower_limit_values_may_shrink_but_not_grow() {
        let shared = limited(SharedLimits::default());
        assert_eq!(shared.set_data("vm", b"k", &[0; 10], 0), Status::Ok);
        shared.set_limits("vm", SharedLimits { bytes_max: 5, ..SharedLimits::default() });
        assert_eq!(shared.set_data("vm", b"k", &[0; 11], 0), Status::InternalFailure);
        assert_eq!(shared.set_data("vm", b"k", &[0; 9], 0), Status::Ok);
    }

    #[test]
    fn queues_keep_order_and_are_bounded() {
        let shared =
            limited(SharedLimits { queue_items_max: 2, queue_bytes_max: 3, queues_max: 1, ..SharedLimits::default() });
        let (worker, mailbox) = shared.add_worker();
        let owner = Owner { worker, vm: 1, context: 1 };
        let id = shared.register_queue("vm", b"q", owner).unwrap();
        assert_eq!(shared.resolve_queue("vm", b"q"), Some(id));
        assert_eq!(shared.resolve_queue("", b"q"), None);
        assert_eq!(shared.register_queue("vm", b"second", owner), None);
        assert_eq!(shared.dequeue(id), Err(Status::Empty));
        assert_eq!(shared.enqueue(id, b"1234"), Status::InternalFailure, "more bytes than all queues may have");
        assert_eq!(shared.enqueue(id, b"1"), Status::Ok);
        assert_eq!(shared.enqueue(id, b"23"), Status::Ok);
        assert_eq!(shared.enqueue(id, b""), Status::InternalFailure, "more items than a queue may have");
        assert_eq!(mailbox.len(), 2, "one notification per item");
        assert_eq!(shared.dequeue(id).unwrap(), b"1");
        assert_eq!(shared.enqueue(id, b"45"), Status::InternalFailure, "two bytes still wait");
        assert_eq!(shared.dequeue(id).unwrap(), b"23");
        assert_eq!(shared.enqueue(id, b"456"), Status::Ok, "what was taken out leaves its room");
        assert_eq!(shared.dequeue(id + 1), Err(Status::NotFound));
        while mailbox.take_one().is_some() {}
        let moved = Owner { worker, vm: 2, context: 9 };
        assert_eq!(shared.register_queue("vm", b"q", moved), Some(id));
        assert_eq!(shared.dequeue(id).unwrap(), b"456");
        assert_eq!(shared.enqueue(id, b"4"), Status::Ok);
        assert_eq!(mailbox.take_one().unwrap().owner, moved);
    }

    #[test]
    fn who_fills_one_queue_keeps_nobody_from_hearing_of_another() {
        let shared = limited(SharedLimits { queue_items_max: 2, ..SharedLimits::default() });
        let (worker, mailbox) = shared.add_worker();
        let owner = Owner { worker, vm: 1, context: 1 };
        let flooded = shared.register_queue("vm", b"flooded", owner).unwrap();
        let other = shared.register_queue("", b"other", owner).unwrap();
        // In and out, more often than the queue can hold items, and the worker does not run meanwhile.
        for _ in 0..10 {
            assert_eq!(shared.enqueue(flooded, b""), Status::Ok);
            assert!(shared.dequeue(flooded).is_ok());
        }
        assert_eq!(shared.enqueue(other, b""), Status::Ok);
        let told: Vec<u32> = std::iter::from_fn(|| mailbox.take_one()).map(|told| told.queue).collect();
        assert_eq!(told, [flooded, flooded, other]);
    }

    #[test]
    fn a_plugin_brings_in_a_bounded_number_of_metrics_however_often_its_vm_is_replaced() {
        let shared = limited(SharedLimits::default());
        let define = |plugin, name| shared.define_metric(plugin, 2, MetricKind::Counter, name).is_some();
        assert!(define("p", "a") && define("p", "b") && !define("p", "c"));
        assert!(define("p", "a"), "one that is there takes no room");
        assert!(define("q", "c") && define("p", "c"), "another plugin has room of its own");
        assert_eq!(shared.metrics().len(), 3);
    }

    #[test]
    fn a_queues_name_is_bounded() {
        let shared = Shared::new();
        let owner = Owner { worker: 1, vm: 1, context: 1 };
        assert!(shared.register_queue("", &[b'q'; NAME_BYTES_MAX], owner).is_some());
        assert_eq!(shared.register_queue("", &[b'q'; NAME_BYTES_MAX + 1], owner), None);
    }

    #[test]
    fn metrics_answer_as_in_envoy() {
        let shared = limited(SharedLimits::default());
        let define = |kind, name| shared.define_metric("p", 10, kind, name).unwrap();
        let counter = define(MetricKind::Counter, "c");
        assert_eq!(counter.increment(0), Status::BadArgument);
        assert_eq!(counter.increment(-1), Status::BadArgument);
        assert_eq!(counter.increment(2), Status::Ok);
        counter.record(3);
        assert_eq!(counter.number(), Some(5), "recording into a counter adds");
        let again = define(MetricKind::Counter, "c");
        assert_eq!(again.number(), Some(5), "a name is one metric");
        let gauge = define(MetricKind::Gauge, "g");
        gauge.record(7);
        assert_eq!(gauge.increment(-2), Status::Ok);
        assert_eq!(gauge.number(), Some(5));
        let histogram = define(MetricKind::Histogram, "h");
        assert_eq!(histogram.increment(1), Status::BadArgument);
        assert_eq!(histogram.number(), None);
        for value in [0, 1, 2, u64::MAX] {
            histogram.record(value);
        }
        let metrics = shared.metrics();
        let MetricValue::Histogram { count, buckets, .. } = &metrics[2].value else { panic!("{metrics:?}") };
        assert_eq!((*count, buckets[0], buckets[1], buckets[19]), (4, (1, 2), (5, 3), (u64::MAX, 4)));
    }
}
