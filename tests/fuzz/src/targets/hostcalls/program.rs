//! Programs: calls with arguments, as bytes for the guest.

use arbitrary::Unstructured;
use portcullis_abi::internals::encode_pairs;

use super::guest::{DATA_BYTES, SCRATCH};

/// What an argument is, so that it is mostly one that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A pointer to something of that kind; its length is the next argument.
    Name,
    Value,
    Pairs,
    Path,
    Upstream,
    Foreign,
    Queue,
    Key,
    /// The length of what the argument before points to.
    Len,
    /// A pointer to where the host writes.
    Return,
    /// A map, a buffer, a stream or side, a level, a metric's kind: small numbers.
    Small,
    /// A context, a token, an id of a metric or a queue.
    Id,
    /// A position or a count.
    Count,
    Status,
    Milliseconds,
    /// A 64-bit number.
    Wide,
}

impl Kind {
    pub(super) fn is_wide(self) -> bool {
        self == Kind::Wide
    }
}

/// A function of the ABI.
pub(super) struct Function {
    pub(super) name: &'static str,
    pub(super) arguments: &'static [Kind],
}

macro_rules! functions {
    ($($name:ident($($kind:ident)*))*) => {
        &[$(Function { name: stringify!($name), arguments: &[$(Kind::$kind),*] }),*]
    };
}

/// Every function that changes or tells something; a test compares it with what the host offers.
pub(super) const FUNCTIONS: &[Function] = functions! {
    proxy_log(Small Value Len)
    proxy_get_log_level(Return)
    proxy_get_current_time_nanoseconds(Return)
    proxy_set_tick_period_milliseconds(Milliseconds)
    proxy_set_effective_context(Id)
    proxy_done()
    proxy_get_property(Path Len Return Return)
    proxy_set_property(Path Len Value Len)
    proxy_call_foreign_function(Foreign Len Value Len Return Return)
    proxy_get_buffer_bytes(Small Count Count Return Return)
    proxy_set_buffer_bytes(Small Count Count Value Len)
    proxy_get_buffer_status(Small Return Return)
    proxy_get_header_map_size(Small Return)
    proxy_get_header_map_pairs(Small Return Return)
    proxy_set_header_map_pairs(Small Pairs Len)
    proxy_get_header_map_value(Small Name Len Return Return)
    proxy_add_header_map_value(Small Name Len Value Len)
    proxy_replace_header_map_value(Small Name Len Value Len)
    proxy_remove_header_map_value(Small Name Len)
    proxy_continue_stream(Small)
    proxy_close_stream(Small)
    proxy_send_local_response(Status Value Len Value Len Pairs Len Small)
    proxy_http_call(Upstream Len Pairs Len Value Len Pairs Len Milliseconds Return)
    proxy_grpc_call(Upstream Len Name Len Name Len Pairs Len Value Len Milliseconds Return)
    proxy_grpc_stream(Upstream Len Name Len Name Len Pairs Len Return)
    proxy_grpc_send(Id Value Len Small)
    proxy_grpc_cancel(Id)
    proxy_grpc_close(Id)
    proxy_get_status(Return Return Return)
    proxy_get_shared_data(Key Len Return Return Return)
    proxy_set_shared_data(Key Len Value Len Small)
    proxy_register_shared_queue(Queue Len Return)
    proxy_resolve_shared_queue(Key Len Queue Len Return)
    proxy_enqueue_shared_queue(Id Value Len)
    proxy_dequeue_shared_queue(Id Return Return)
    proxy_define_metric(Small Key Len Return)
    proxy_increment_metric(Id Wide)
    proxy_record_metric(Id Wide)
    proxy_get_metric(Id Return)
    fd_write(Small Return Small Return)
    clock_time_get(Small Wide Return)
    random_get(Return Small)
    environ_get(Return Return)
    environ_sizes_get(Return Return)
};

/// Things that pointers point to, at fixed places in the guest's memory.
pub(super) struct Data {
    bytes: Vec<u8>,
    places: Vec<(Kind, u32, u32)>,
}

impl Data {
    pub(super) fn new() -> Data {
        let mut data = Data { bytes: Vec::new(), places: Vec::new() };
        for name in [
            "x-a",
            "x-b",
            ":method",
            ":path",
            ":authority",
            "host",
            ":status",
            "content-length",
            "X-A",
            "x y",
            ":x",
            "",
            "te",
        ] {
            data.put(Kind::Name, name.as_bytes());
        }
        for value in [
            "",
            "1",
            "GET",
            "/",
            "/a?b",
            "a value",
            "x\r\ny",
            "\0",
            "200",
            "chunked",
            "\u{e9}",
            "0123456789abcdef0123456789abcdef",
        ] {
            data.put(Kind::Value, value.as_bytes());
        }
        let request: &[(&[u8], &[u8])] =
            &[(b":method", b"GET"), (b":path", b"/"), (b":authority", b"a"), (b"x-a", b"1")];
        for pairs in [
            request,
            &[],
            &[(b"x-a", b"1"), (b"x-a", b"2")],
            &[(b":status", b"200")],
            &[(b":path", b"")],
            &[(b"x\n", b"")],
        ] {
            data.put(Kind::Pairs, &encode_pairs(pairs));
        }
        data.put(Kind::Pairs, b"\x01\0\0\0\xff\0\0\0");
        for path in [
            "request\0path",
            "request\0headers\0x-a",
            "response\0code",
            "x",
            "filter_state\0x",
            "plugin_name",
            "connection\0id",
            "source\0address",
            "response\0headers",
            "xds\0route_name",
            "upstream\0address",
            "node",
        ] {
            data.put(Kind::Path, path.as_bytes());
        }
        for upstream in ["auth", "grpc", "nowhere", "\u{e9}"] {
            data.put(Kind::Upstream, upstream.as_bytes());
        }
        for function in [
            "compress",
            "uncompress",
            "verify_signature",
            "sign",
            "clear_route_cache",
            "declare_property",
            "set_envoy_filter_state",
            "expr_create",
            "expr_evaluate",
            "expr_delete",
            "nothing",
        ] {
            data.put(Kind::Foreign, function.as_bytes());
        }
        for name in ["q", "r", "a", "b", ""] {
            data.put(Kind::Queue, name.as_bytes());
            data.put(Kind::Key, name.as_bytes());
        }
        assert!(data.bytes.len() <= DATA_BYTES, "{} bytes", data.bytes.len());
        data.bytes.resize(DATA_BYTES, 0);
        data
    }

    fn put(&mut self, kind: Kind, bytes: &[u8]) {
        self.places.push((kind, self.bytes.len() as u32, bytes.len() as u32));
        self.bytes.extend_from_slice(bytes);
    }

    fn choose(&self, kind: Kind, u: &mut Unstructured<'_>) -> arbitrary::Result<(u32, u32)> {
        let of_kind: Vec<_> = self.places.iter().filter(|(of, ..)| *of == kind).collect();
        let place = if of_kind.is_empty() || u.ratio(1, 16)? { u.choose(&self.places)? } else { u.choose(&of_kind)? };
        Ok((place.1, place.2))
    }

    /// A program of random calls, in as many callbacks as the input has choices for.
    pub(super) fn program(&self, u: &mut Unstructured<'_>) -> Vec<u8> {
        let mut program = self.bytes.clone();
        // What cannot be chosen any more is left out: the guest then does nothing.
        while !u.is_empty() && program.len() < 32 * 1024 && self.callback(u, &mut program).is_ok() {}
        program
    }

    /// A program that asks for one property, in each callback.
    pub(super) fn asking(&self, path: &[u8]) -> Vec<u8> {
        let mut program = self.bytes.clone();
        let path = &path[..path.len().min(DATA_BYTES / 4)];
        let at = DATA_BYTES - path.len();
        program[at..].copy_from_slice(path);
        let number = FUNCTIONS.iter().position(|function| function.name == "proxy_get_property").unwrap_or_default();
        for _ in 0..32 {
            program.extend([1, number as u8]);
            for argument in [at as u64, path.len() as u64, u64::from(SCRATCH), u64::from(SCRATCH) + 4] {
                program.extend(argument.to_le_bytes());
            }
            program.push(0);
        }
        program
    }

    fn callback(&self, u: &mut Unstructured<'_>, program: &mut Vec<u8>) -> arbitrary::Result<()> {
        let calls = u.int_in_range(0..=4)?;
        program.push(calls);
        for _ in 0..calls {
            let number = u.choose_index(FUNCTIONS.len())?;
            program.push(number as u8);
            let mut len = 0;
            for kind in FUNCTIONS[number].arguments {
                let value = self.argument(*kind, &mut len, u)?;
                program.extend(value.to_le_bytes());
            }
        }
        // The answer: an action, or yes and no.
        program.push(if u.ratio(1, 3)? { u.int_in_range(0..=5)? } else { 0 });
        Ok(())
    }

    fn argument(&self, kind: Kind, len: &mut u32, u: &mut Unstructured<'_>) -> arbitrary::Result<u64> {
        // A wild one ends the guest in most places, so there are few.
        if u.ratio(1, 400)? {
            return u.arbitrary();
        }
        Ok(match kind {
            Kind::Name
            | Kind::Value
            | Kind::Pairs
            | Kind::Path
            | Kind::Upstream
            | Kind::Foreign
            | Kind::Queue
            | Kind::Key => {
                let (at, bytes) = self.choose(kind, u)?;
                *len = bytes;
                u64::from(at)
            }
            Kind::Len => u64::from(if u.ratio(1, 24)? { u.int_in_range(0..=64)? } else { *len }),
            Kind::Return => u64::from(SCRATCH + 4 * u.int_in_range(0..=7)?),
            Kind::Small => u.int_in_range(0..=9)?,
            // Metrics, queues, contexts and calls have small ids; calls count in steps of four.
            Kind::Id => u.int_in_range(0..=24)?,
            Kind::Count => *u.choose(&[0, 0, 1, 2, 3, 16, 100, 1000, u64::from(u32::MAX)])?,
            Kind::Status => *u.choose(&[200, 403, 204, 500, 100, 0, 999])?,
            Kind::Milliseconds => *u.choose(&[0, 1, 5, 1000, 1_000_000, u64::from(u32::MAX)])?,
            Kind::Wide => *u.choose(&[0, 1, u64::MAX, 1 << 63, 1000])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_of_the_host_that_does_something_is_called() {
        let known: Vec<&str> = FUNCTIONS.iter().map(|function| function.name).collect();
        // Functions of ABI 0.1.0, which a guest of 0.2.1 may not import.
        const OLD: [&str; 4] =
            ["proxy_get_configuration", "proxy_continue_request", "proxy_continue_response", "proxy_clear_route_cache"];
        // What has one answer whatever it is given, and what the guest uses itself.
        let constant = |name: &str| {
            !name.starts_with("proxy_")
                && !["fd_write", "clock_time_get", "random_get", "environ_get", "environ_sizes_get"].contains(&name)
        };
        let missing: Vec<&&str> = portcullis_config::HOST_FUNCTIONS
            .iter()
            .filter(|name| !known.contains(*name) && !constant(name) && !OLD.contains(*name))
            .collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
