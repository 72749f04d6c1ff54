//! WASI, function by function: the answers that Envoy 1.40 gave to the same calls, and when it lets them be made.

use portcullis_abi::Plugin;

use crate::support::{Host, module};

/// When a function is called.
#[derive(Clone, Copy)]
enum When {
    /// From `_initialize`.
    Starting,
    /// From the allocator.
    Allocating,
    /// From an ordinary callback.
    Running,
}

/// A module that calls `function` with these arguments (`l` behind one makes it 64 bits wide), and says the answer, two
/// digits, and the bytes at 1024.
fn calls(function: &str, arguments: &str, when: When) -> Plugin {
    let types: Vec<&str> =
        arguments.split_whitespace().map(|argument| if argument.ends_with('l') { "i64" } else { "i32" }).collect();
    let values: Vec<String> = arguments
        .split_whitespace()
        .zip(&types)
        .map(|(argument, ty)| format!("({ty}.const {})", argument.trim_end_matches('l')))
        .collect();
    let (result, call) = if function == "proc_exit" {
        ("", format!("(call $f {}) (call $tell (i32.const 0))", values.join(" ")))
    } else {
        ("(result i32)", format!("(call $tell (call $f {}))", values.join(" ")))
    };
    let (start, allocate, configure) = match when {
        When::Starting => (call.as_str(), "", ""),
        When::Allocating => (
            "",
            call.as_str(),
            "(drop (call $get (i32.const 7) (i32.const 0) (i32.const 1) (i32.const 200) (i32.const 204)))",
        ),
        When::Running => ("", "", call.as_str()),
    };
    let text = format!(
        r#"(module
        (import "wasi_snapshot_preview1" "{function}" (func $f (param {types}) {result}))
        (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
        (import "env" "proxy_get_buffer_bytes" (func $get (param i32 i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 2)
        ;; What is written to, and an I/O vector of two pieces.
        (data (i32.const 1024) "................................")
        (data (i32.const 2048) "\10\08\00\00\03\00\00\00\14\08\00\00\03\00\00\00one\0atwo")
        (func $tell (param i32)
          (i32.store8 (i32.const 16) (i32.add (i32.const 48) (i32.div_u (local.get 0) (i32.const 10))))
          (i32.store8 (i32.const 17) (i32.add (i32.const 48) (i32.rem_u (local.get 0) (i32.const 10))))
          (drop (call $log (i32.const 2) (i32.const 16) (i32.const 2)))
          (drop (call $log (i32.const 2) (i32.const 1024) (i32.const 24))))
        (func (export "malloc") (param i32) (result i32) {allocate} (i32.const 4096))
        (func (export "proxy_abi_version_0_2_1"))
        (func (export "_initialize") {start})
        (func (export "proxy_on_configure") (param i32 i32) (result i32) {configure} (i32.const 1)))"#,
        types = types.join(" ")
    );
    let mut plugin = Plugin::new("probe", module(&text).unwrap());
    plugin.configuration = b"x".to_vec();
    plugin
}

/// What the guest logs; the error if the host ended it.
fn log(function: &str, arguments: &str, when: When) -> Result<Vec<String>, String> {
    Host::try_new(vec![calls(function, arguments, when)])
        .map(|host| host.world.log.take())
        .map_err(|error| error.to_string())
}

fn errno(function: &str, arguments: &str) -> String {
    let log = log(function, arguments, When::Running).unwrap_or_else(|error| panic!("{function}: {error}"));
    let answer = log.iter().find(|line| line.len() == 2 && line.bytes().all(|byte| byte.is_ascii_digit()));
    answer.unwrap_or_else(|| panic!("{function}: {log:?}")).clone()
}

/// Function, arguments (an `fd` first where there is one), answer, and whether it can be called while the guest starts.
const FUNCTIONS: [(&str, &str, &str, bool); 60] = [
    ("args_get", "1024 1088", "00", true),
    ("args_sizes_get", "1024 1028", "00", true),
    ("clock_res_get", "0 1024", "00", true),
    ("clock_res_get", "1 1024", "00", true),
    ("clock_res_get", "2 1024", "58", true),
    ("clock_time_get", "0 0l 1024", "00", true),
    ("clock_time_get", "1 0l 1024", "00", true),
    ("clock_time_get", "2 0l 1024", "58", true),
    ("environ_get", "1024 1088", "00", true),
    ("environ_sizes_get", "1024 1028", "00", true),
    ("fd_advise", "99 0l 0l 9", "00", true),
    ("fd_allocate", "0 0l 0l", "08", true),
    ("fd_allocate", "1 0l 0l", "00", true),
    ("fd_close", "1", "00", false),
    ("fd_close", "99", "00", false),
    ("fd_datasync", "2", "00", true),
    ("fd_datasync", "3", "08", true),
    ("fd_fdstat_get", "0 1024", "08", true),
    ("fd_fdstat_get", "2 1024", "00", true),
    ("fd_fdstat_set_flags", "1 0", "52", true),
    ("fd_fdstat_set_rights", "1 0l 0l", "00", true),
    ("fd_fdstat_set_rights", "3 0l 0l", "08", true),
    ("fd_filestat_get", "1 1024", "08", true),
    ("fd_filestat_set_size", "1 0l", "00", true),
    ("fd_filestat_set_size", "0 0l", "08", true),
    ("fd_filestat_set_times", "2 0l 0l 0", "00", true),
    ("fd_filestat_set_times", "3 0l 0l 0", "08", true),
    ("fd_pread", "0 2048 1 0l 1024", "52", true),
    ("fd_prestat_dir_name", "3 1024 8", "52", true),
    ("fd_prestat_get", "3 1024", "08", true),
    ("fd_pwrite", "0 2048 1 0l 1024", "08", true),
    ("fd_pwrite", "1 2048 1 0l 1024", "00", true),
    ("fd_read", "0 2048 1 1024", "52", false),
    ("fd_readdir", "3 1088 8 0l 1024", "20", true),
    ("fd_renumber", "0 1", "08", true),
    ("fd_renumber", "1 2", "58", true),
    ("fd_seek", "1 0l 0 1024", "00", false),
    ("fd_sync", "1", "00", true),
    ("fd_sync", "0", "08", true),
    ("fd_tell", "1 1024", "00", true),
    ("fd_tell", "0 1024", "08", true),
    ("fd_write", "0 2048 2 1024", "08", true),
    ("path_create_directory", "3 1024 1", "58", true),
    ("path_filestat_get", "3 0 1024 1 1088", "58", true),
    ("path_filestat_set_times", "3 0 1024 1 0l 0l 0", "58", true),
    ("path_open", "3 0 1024 1 0 0l 0l 0 1088", "44", false),
    ("path_readlink", "3 1024 1 1088 8 1152", "58", true),
    ("path_remove_directory", "3 1024 1", "58", true),
    ("path_rename", "3 1024 1 3 1024 1", "58", true),
    ("path_unlink_file", "3 1024 1", "58", true),
    ("poll_oneoff", "2048 1088 1 1024", "00", true),
    ("proc_exit", "3", "00", false),
    ("random_get", "1024 8", "00", true),
    ("random_get", "1024 65537", "28", true),
    ("random_get", "1024 0", "00", true),
    ("sched_yield", "", "00", false),
    ("sock_accept", "3 0 1024", "58", true),
    ("sock_recv", "3 2048 1 0 1024 1028", "58", true),
    ("sock_send", "3 2048 1 0 1024", "58", true),
    ("sock_shutdown", "3 0", "58", true),
];

#[test]
fn each_function_answers_as_in_envoy() {
    for (function, arguments, expected, _) in FUNCTIONS {
        assert_eq!(errno(function, arguments), expected, "{function} {arguments}");
    }
    // Envoy's have a parameter less, and no module with WASI's own types can be loaded there.
    assert_eq!(errno("path_link", "3 0 1024 1 3 1024 1"), "58");
    assert_eq!(errno("path_symlink", "1024 1 3 1024 1"), "58");
}

#[test]
fn while_the_guest_starts_some_functions_end_it() {
    for (function, arguments, _, starting) in FUNCTIONS {
        match log(function, arguments, When::Starting) {
            Ok(_) => assert!(starting, "{function}"),
            Err(error) => {
                assert!(!starting, "{function}: {error}");
                assert!(error.contains(&format!("called `{function}` while the guest starts")), "{error}");
            }
        }
    }
}

#[test]
fn while_it_allocates_only_output_the_clock_and_waiting_are_left() {
    for (function, arguments, _, _) in FUNCTIONS {
        let left = ["fd_write", "clock_time_get", "poll_oneoff"].contains(&function);
        match log(function, arguments, When::Allocating) {
            Ok(_) => assert!(left, "{function}"),
            Err(error) => assert!(!left && error.contains("has an allocator that refused"), "{function}: {error}"),
        }
    }
}

#[test]
fn what_is_written_is_what_envoy_writes() {
    let check = |function: &str, arguments: &str, expected: &[u8]| {
        let log = log(function, arguments, When::Running).unwrap();
        let memory = log.last().unwrap();
        let mut whole = expected.to_vec();
        whole.resize(24, b'.');
        assert_eq!(memory.as_bytes(), String::from_utf8_lossy(&whole).as_bytes(), "{function} {arguments}");
    };
    check("args_sizes_get", "1024 1028", &[0; 8]);
    check("clock_res_get", "0 1024", b"\x01\0\0\0\0\0\0\0");
    check("environ_sizes_get", "1024 1028", &[0; 8]);
    check("fd_fdstat_get", "1 1024", b"\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    check("fd_filestat_get", "1 1024", b"");
    check("fd_pwrite", "1 2048 2 0l 1024", b"\x06\0\0\0");
    check("fd_readdir", "3 1088 8 0l 1024", &[0; 4]);
    check("fd_seek", "1 0l 0 1024", b"");
    check("fd_tell", "1 1024", &[0; 8]);
    check("fd_write", "1 2048 2 1024", b"\x06\0\0\0");
    check("poll_oneoff", "2048 1088 1 1024", &[0; 4]);
    check("random_get", "1024 0", b"");
}

/// Envoy's have none, and read as long as the guest says.
#[test]
fn the_pieces_of_one_write_are_bounded() {
    assert_eq!(errno("fd_write", "1 65536 1024 1024"), "00");
    assert_eq!(errno("fd_write", "1 65536 1025 1024"), "28");
}

#[test]
fn pointers_outside_memory_are_a_fault() {
    for (function, arguments) in [
        ("fd_write", "1 131070 1 1024"),
        ("fd_write", "1 2048 1 131070"),
        ("clock_time_get", "0 0l 131070"),
        ("random_get", "131070 8"),
        ("args_sizes_get", "131070 1024"),
        ("environ_sizes_get", "1024 -1"),
        ("poll_oneoff", "0 0 0 -1"),
    ] {
        assert_eq!(errno(function, arguments), "21", "{function} {arguments}");
    }
}

#[test]
fn output_becomes_lines_of_the_log() {
    let said = |fd: u32| log("fd_write", &format!("{fd} 2048 2 1024"), When::Running).unwrap()[0].clone();
    assert_eq!((said(1).as_str(), said(2).as_str()), ("onetwo", "onetwo"));
}
