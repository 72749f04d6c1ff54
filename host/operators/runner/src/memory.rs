//! Memory that V8's own limit does not see: array buffers, and what this program allocates for an operator (bodies, blobs,
//! compressors). Both are counted here; the JavaScript heap has V8's limit, and the kernel's stands behind all.
#![expect(unsafe_code, reason = "allocators are unsafe to write. SAFETY at each block")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use deno_core::v8;

static USED: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);
static BUDGET: AtomicUsize = AtomicUsize::new(usize::MAX);

/// What happened to the latest array buffer. V8 tries a few times, and before the last time says that it lacks memory.
static LATEST: AtomicU8 = AtomicU8::new(GRANTED);
const GRANTED: u8 = 0;
const REFUSED: u8 = 1;
const LAST_TRY: u8 = 2;

/// What array buffers and Rust's allocations may have together, on top of what is in use now.
pub(crate) fn limit(bytes: usize) {
    BUDGET.store(bytes, Ordering::Relaxed);
    LIMIT.store(USED.load(Ordering::Relaxed).saturating_add(bytes), Ordering::Relaxed);
}

/// Beyond the limit before an isolate ends: an operator that fills its buffers to the brim should get an exception, and the
/// process needs a little to tell it.
const SLACK_BYTES: usize = 4 << 20;

/// Whether they have more. An array buffer that would pass the limit is refused; allocations of Rust's cannot be, so the
/// isolate that causes them ends.
pub(crate) fn is_full() -> bool {
    USED.load(Ordering::Relaxed) > LIMIT.load(Ordering::Relaxed).saturating_add(SLACK_BYTES)
}

/// Whether V8 lacks memory because it was refused an array buffer just now. Called when it says so.
pub(crate) fn was_refused() -> bool {
    LATEST.compare_exchange(REFUSED, LAST_TRY, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// Whether memory outside of V8's heap, as V8 counts it, is more than allowed: WebAssembly's memories are no array buffers
/// of ours.
pub(crate) fn is_too_much(external: usize) -> bool {
    external > BUDGET.load(Ordering::Relaxed).saturating_add(SLACK_BYTES)
}

/// Counts what Rust allocates.
#[derive(Debug)]
pub(crate) struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged; counting touches one atomic and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        USED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are the ones asked for here.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        USED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above, and `pointer` came from the same allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        USED.fetch_add(size, Ordering::Relaxed);
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Allocates array buffers within the limit. What it refuses becomes a `RangeError` in JavaScript.
pub(crate) fn array_buffers() -> v8::UniqueRef<v8::Allocator> {
    static VTABLE: v8::RustAllocatorVtable<()> =
        v8::RustAllocatorVtable { allocate, allocate_uninitialized: allocate, free, drop: forget };
    static NOTHING: () = ();
    // SAFETY: the functions below do not use the handle, which lives for ever.
    unsafe { v8::new_rust_allocator(&raw const NOTHING, &VTABLE) }
}

unsafe extern "C" fn allocate(_: &(), length: usize) -> *mut c_void {
    if USED.load(Ordering::Relaxed).saturating_add(length) > LIMIT.load(Ordering::Relaxed) {
        let before = LATEST.load(Ordering::Relaxed);
        LATEST.store(if before == LAST_TRY { GRANTED } else { REFUSED }, Ordering::Relaxed);
        return std::ptr::null_mut();
    }
    LATEST.store(GRANTED, Ordering::Relaxed);
    // SAFETY: calloc(3) takes any sizes and answers with null where it has no memory. Zeroed in any case: memory that comes
    // fresh from the kernel costs nothing more, and what an earlier request left must not show.
    let pointer = unsafe { libc::calloc(length.max(1), 1) };
    if !pointer.is_null() {
        USED.fetch_add(length, Ordering::Relaxed);
    }
    pointer
}

unsafe extern "C" fn free(_: &(), pointer: *mut c_void, length: usize) {
    USED.fetch_sub(length, Ordering::Relaxed);
    // SAFETY: V8 frees what `allocate` gave it, once.
    unsafe { libc::free(pointer) };
}

unsafe extern "C" fn forget(_: *const ()) {}
