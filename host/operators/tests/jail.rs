//! The jail by itself: what the operating system denies when the engine's own permissions are of no help.
//!
//! Every script here runs with `deno run -A` and with raw system calls through the C library.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::os::unix::net::UnixListener;
use std::time::Duration;

use portcullis_operators::jail::{Isolation, LaunchError, Layer, LayerState, Report};

use support::{Attack, DEADLINE, Outcome, launcher, spec};

/// Runs the script and compares how each attempt in it went; `ALLOWED` and `DENIED` are written by the script.
fn check(attack: Attack, expected: &[(&str, &str)]) -> Outcome {
    let outcome = attack.run();
    for (attempt, wanted) in expected {
        let found = outcome.get(attempt);
        assert!(found.contains(wanted), "{attempt}: expected `{wanted}`, got `{found}`\n{outcome}");
    }
    outcome
}

#[test]
fn every_layer_this_machine_offers_to_root_is_active() {
    let outcome = check(Attack::new("await tries({ runs: () => 1 });"), &[("runs", "ALLOWED 1")]);
    let root = rustix::process::geteuid().is_root();
    for row in outcome.report.rows() {
        // An ordinary user shares its uid with its operators; groups are the host's to make, and none is made here. All
        // else needs no privilege on a usual kernel.
        let tolerated = (!root && row.layer == Layer::Uid) || row.layer == Layer::ControlGroup;
        assert!(tolerated || !matches!(row.state, LayerState::Missing { .. }), "{}: {}", row.layer, row.reason());
    }
}

#[test]
fn files_of_the_machine_are_out_of_reach() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret.txt");
    std::fs::write(&secret, "canary").unwrap();
    let mut attack = Attack::new(
        r#"
const [secret] = ARGS;
await tries({
  passwd: () => Deno.readTextFileSync("/etc/passwd"),
  secret: () => Deno.readTextFileSync(secret),
  import_text: () => import("file://" + secret, { with: { type: "text" } }),
  proc: () => Deno.readTextFileSync("/proc/self/environ"),
  root: () => [...Deno.readDirSync("/")].map((entry) => entry.name).sort().join(),
  write_root: () => Deno.writeTextFileSync("/x", "x"),
  write_shim: () => Deno.writeTextFileSync("/attack.js", "x"),
  write_engine: () => Deno.openSync("/deno", { write: true }),
  symlink: () => Deno.symlinkSync("/etc/passwd", PRIVATE + "/link"),
  link: () => { Deno.writeTextFileSync(PRIVATE + "/f", "x"); Deno.linkSync("/deno", PRIVATE + "/link"); },
  mknod: () => syscall(133, text(PRIVATE + "/null"), 0o20666, 0x103),
  chroot: () => syscall(161, text("/private")),
  mount: () => syscall(165, text("none"), text("/private"), text("tmpfs"), 0, 0),
  private: () => { Deno.writeTextFileSync(PRIVATE + "/own", "mine"); return Deno.readTextFileSync(PRIVATE + "/own"); },
});
"#,
    );
    attack.arguments = vec![secret.display().to_string()];
    let outcome = check(
        attack,
        &[
            ("passwd", "DENIED"),
            ("secret", "DENIED"),
            ("import_text", "DENIED"),
            ("proc", "DENIED"),
            ("root", "DENIED"),
            ("write_root", "DENIED"),
            ("write_shim", "DENIED"),
            ("write_engine", "DENIED"),
            ("symlink", "DENIED"),
            ("link", "DENIED"),
            ("mknod", "DENIED errno 1"),
            ("chroot", "DENIED errno 1"),
            ("mount", "DENIED errno 1"),
            ("private", "ALLOWED mine"),
        ],
    );
    assert!(!outcome.output.contains("canary"));
}

#[test]
fn files_stay_out_of_reach_with_either_wall_alone() {
    for layer in [Layer::MountNamespace, Layer::Landlock] {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret.txt");
        std::fs::write(&secret, "canary").unwrap();
        let mut attack = Attack::new(
            r#"
const [secret] = ARGS;
await tries({
  passwd: () => Deno.readTextFileSync("/etc/passwd"),
  secret: () => Deno.readTextFileSync(secret),
  write: () => Deno.writeTextFileSync(secret + ".new", "x"),
});
"#,
        );
        attack.without = vec![layer];
        attack.arguments = vec![secret.display().to_string()];
        let outcome = check(attack, &[("passwd", "DENIED"), ("secret", "DENIED"), ("write", "DENIED")]);
        assert!(!outcome.report.is_active(layer));
        assert!(!outcome.output.contains("canary"));
    }
}

#[test]
fn no_network_by_any_interface() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("other.sock");
    let other = UnixListener::bind(&socket).unwrap();
    other.set_nonblocking(true).unwrap();
    let mut attack = Attack::new(
        r#"
const [port, socket] = ARGS;
await tries({
  fetch: () => fetch(`http://127.0.0.1:${port}/`),
  connect: () => Deno.connect({ hostname: "127.0.0.1", port: +port }),
  websocket: () => new Promise((resolve, reject) => { const s = new WebSocket(`ws://127.0.0.1:${port}/`); s.onopen = resolve; s.onerror = (e) => reject(e); }),
  listen: () => Deno.listen({ port: 0 }),
  udp: () => Deno.listenDatagram({ port: 0, transport: "udp", hostname: "127.0.0.1" }),
  dns: () => Deno.resolveDns("localhost", "A"),
  unix: () => Deno.connect({ transport: "unix", path: socket }),
  abstract: () => Deno.connect({ transport: "unix", path: "\0portcullis-test" }),
  inet: () => syscall(41, 2, 1, 0),
  inet6: () => syscall(41, 10, 1, 0),
  inet_high_bits: () => syscall(41, 0x100000001n, 1, 0),
  packet: () => syscall(41, 17, 3, 0),
  netlink: () => syscall(41, 16, 3, 0),
  vsock: () => syscall(41, 40, 1, 0),
  io_uring: () => syscall(425, 4, 0),
});
Deno.exit(0);
"#,
    );
    attack.arguments = vec![listener.local_addr().unwrap().port().to_string(), socket.display().to_string()];
    let mut expected: Vec<(&str, &str)> = [
        "fetch",
        "connect",
        "websocket",
        "listen",
        "udp",
        "dns",
        "unix",
        "abstract",
        "inet",
        "inet6",
        "packet",
        "netlink",
        "vsock",
        "io_uring",
    ]
    .into_iter()
    .map(|attempt| (attempt, "DENIED"))
    .collect();
    // The kernel looks at the low 32 bits only, and so does the filter: this asks for AF_UNIX.
    expected.push(("inet_high_bits", "ALLOWED"));
    check(attack, &expected);
    assert!(listener.accept().is_err(), "something connected to the listener");
    assert!(other.accept().is_err(), "something connected to the other socket");
}

#[test]
fn other_processes_are_out_of_reach() {
    let mut attack = Attack::new(
        r#"
const [host] = ARGS;
await tries({
  pid: () => syscall(39),
  parent: () => syscall(110),
  command: () => new Deno.Command("/deno", { args: ["--version"] }).outputSync(),
  fork: () => syscall(57),
  vfork: () => syscall(58),
  clone: () => syscall(56, 17, 0, 0, 0, 0),
  clone_thread_newuser: () => syscall(56, 0x10000 | 0x10000000, 0, 0, 0, 0),
  clone3: () => syscall(435, 0, 0),
  kill: () => syscall(62, host, 9),
  kill_all: () => syscall(62, -1, 9),
  tgkill: () => syscall(234, host, host, 9),
  tkill: () => syscall(200, host, 9),
  ptrace: () => syscall(101, 16, host, 0, 0),
  read_memory: () => syscall(310, host, 0, 0, 0, 0, 0),
  pidfd_open: () => syscall(434, host, 0),
  unshare: () => syscall(272, 0x10000000),
  setns: () => syscall(308, 0, 0),
  setuid: () => syscall(105, 0),
  setgroups: () => syscall(116, 0, 0),
  keep_after_host: () => syscall(157, 1, 0, 0, 0, 0),
  affinity: () => syscall(203, 0, 8, 0),
  nice: () => syscall(141, 0, 0, -20),
  bpf: () => syscall(321, 0, 0, 0),
  perf: () => syscall(298, 0, 0, 0, 0, 0),
  userfaultfd: () => syscall(323, 0),
  memfd: () => syscall(319, text("x"), 0),
  keyctl: () => syscall(250, 0, 0, 0, 0, 0),
  shm: () => syscall(29, 0, 4096, 0o1600),
  module: () => syscall(175, 0, 0, 0),
  raise_limit: () => { const b = new BigUint64Array([1n << 40n, 1n << 40n]); kept.push(b); return syscall(302, 0, 2, Deno.UnsafePointer.value(Deno.UnsafePointer.of(b)), 0); },
  tty_push: () => syscall(16, 0, 0x5412, 0),
});
"#,
    );
    attack.arguments = vec![std::process::id().to_string()];
    let mut expected: Vec<(&str, &str)> = [
        "command",
        "fork",
        "vfork",
        "clone",
        "clone_thread_newuser",
        "kill",
        "kill_all",
        "tgkill",
        "tkill",
        "ptrace",
        "read_memory",
        "pidfd_open",
        "unshare",
        "setns",
        "setuid",
        "setgroups",
        "keep_after_host",
        "affinity",
        "nice",
        "bpf",
        "perf",
        "userfaultfd",
        "memfd",
        "keyctl",
        "shm",
        "module",
        "raise_limit",
        "tty_push",
    ]
    .into_iter()
    .map(|attempt| (attempt, "DENIED"))
    .collect();
    expected.extend([("pid", "ALLOWED 1"), ("parent", "ALLOWED 0"), ("clone3", "DENIED errno 38")]);
    check(attack, &expected);
}

#[test]
fn the_hosts_environment_and_files_are_not_inherited() {
    let outcome = check(
        Attack::new(
            r#"
await tries({
  env: () => Object.keys(Deno.env.toObject()).sort().join(),
  hostname: () => Deno.hostname(),
  descriptors: () => { const open = []; for (let fd = 3; fd < 256; fd++) { try { syscall(72, fd, 1); } catch { continue; } open.push(fd); } return open.length; },
  regular_files: () => { const b = new Uint8Array(144); let found = 0; for (let fd = 0; fd < 256; fd++) { try { syscall(5, fd, Deno.UnsafePointer.value(Deno.UnsafePointer.of(b))); } catch { continue; } const mode = new DataView(b.buffer).getUint32(24, true) & 0o170000; if (mode === 0o040000) found++; } return found; },
  stdin: () => Deno.stdin.readSync(new Uint8Array(1)),
});
"#,
        ),
        &[
            ("env", "ALLOWED DENO_DIR,DENO_NO_UPDATE_CHECK,HOME,NO_COLOR,PATH"),
            ("hostname", "ALLOWED operator"),
            ("regular_files", "ALLOWED 0"),
            ("stdin", "ALLOWED null"),
        ],
    );
    drop(outcome);
}

#[test]
fn the_private_directory_has_a_quota() {
    check(
        Attack::new(
            r#"
let written = 0;
await tries({
  fill: () => { const file = Deno.openSync(PRIVATE + "/big", { create: true, write: true }); const chunk = new Uint8Array(1 << 20); for (let i = 0; i < 64; i++) written += file.writeSync(chunk); },
  written: () => written <= 4 << 20,
  many: () => { Deno.removeSync(PRIVATE + "/big"); for (let i = 0; i < 1000; i++) Deno.writeTextFileSync(PRIVATE + "/f" + i, ""); },
});
"#,
        ),
        &[("fill", "DENIED"), ("written", "ALLOWED true"), ("many", "DENIED")],
    );
}

#[test]
fn memory_is_bounded_where_v8_does_not_count() {
    check(
        Attack::new(
            r#"
const kept2 = [];
await tries({
  buffers: () => { for (let i = 0; i < 64; i++) kept2.push(new Uint8Array(16 << 20).fill(1)); },
  total: () => kept2.length < 24,
});
"#,
        ),
        &[("buffers", "DENIED"), ("total", "ALLOWED true")],
    );
}

#[test]
fn a_group_that_cannot_be_entered_is_reported_and_no_obstacle() {
    for (group, said) in [
        (Err("not delegated".to_owned()), "not delegated"),
        (Ok(("/absent/group".into(), LayerState::Active)), "No such file"),
        (Ok((std::env::temp_dir(), LayerState::Active)), ""),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(folder.path());
        spec.group = group;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let confined = runtime.block_on(async { launcher().launch(&spec, DEADLINE).await }).unwrap();
        assert!(!confined.report.is_active(Layer::ControlGroup));
        let row = confined.report.rows().find(|row| row.layer == Layer::ControlGroup).unwrap();
        assert!(row.reason().contains(said) && !row.reason().is_empty(), "{}", row.reason());
    }
}

#[test]
fn threads_are_bounded() {
    let outcome = Attack::new(
        r#"
await tries({ start: () => 1 });
const workers = [];
for (let i = 0; i < 100; i++) workers.push(new Worker("data:text/javascript,setInterval(()=>{},1000)", { type: "module" }));
await new Promise((resolve) => setTimeout(resolve, 1000));
await tries({ all_started: () => workers.length });
Deno.exit(0);
"#,
    )
    .run();
    // Deno does not survive a thread that cannot start: the process ends, the machine does not notice.
    assert_eq!(outcome.get("start"), "ALLOWED 1");
    assert_eq!(outcome.get("all_started"), "(did not run)", "{outcome}");
}

#[test]
fn required_isolation_refuses_to_start_without_a_layer() {
    for layer in [Layer::Landlock, Layer::NetNamespace, Layer::Seccomp, Layer::UserNamespace] {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(folder.path());
        spec.isolation = Isolation::Required;
        spec.without = vec![layer];
        let error = launch(&spec).unwrap_err();
        // An ordinary user lacks one more, which is named first.
        let wanted = if rustix::process::geteuid().is_root() { layer } else { Layer::Uid };
        assert!(matches!(&error, LaunchError::Refused { reason } if reason.contains(&wanted.to_string())), "{error}");
    }
}

#[test]
fn best_effort_still_refuses_to_start_without_the_floor() {
    for layers in [vec![Layer::Seccomp], vec![Layer::Rlimits], vec![Layer::MountNamespace, Layer::Landlock]] {
        let folder = tempfile::tempdir().unwrap();
        let mut spec = spec(folder.path());
        spec.without = layers;
        assert!(matches!(launch(&spec), Err(LaunchError::Refused { .. })));
    }
}

#[test]
fn an_engine_that_cannot_be_executed_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path());
    spec.argv = vec!["/absent".to_owned()];
    let error = launch(&spec).unwrap_err().to_string();
    assert!(error.contains("exec"), "{error}");
}

fn launch(spec: &portcullis_operators::jail::Spec) -> Result<(), LaunchError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { launcher().launch(spec, DEADLINE).await.map(|_confined| ()) })
}

/// The test binary is the host of a process of its own here: it starts itself again, and is killed.
#[test]
fn nothing_survives_a_killed_host() {
    const VARIABLE: &str = "PORTCULLIS_TEST_HOST_TO_KILL";
    if std::env::var_os(VARIABLE).is_some() {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec(folder.path());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let confined = runtime.block_on(launcher().launch(&spec, DEADLINE)).unwrap();
        let waiting = launcher().start(&[]).unwrap();
        println!("confined {} {}", confined.pid, waiting.id());
        std::thread::sleep(DEADLINE);
        return;
    }
    let mut host = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nothing_survives_a_killed_host", "--nocapture"])
        .env(VARIABLE, "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = std::io::BufReader::new(host.stdout.take().unwrap());
    let pids = std::io::BufRead::lines(output)
        .map_while(Result::ok)
        .find_map(|line| line.split_once("confined ").map(|(_, pid)| pid.trim().to_owned()))
        .expect("the inner host says which process it confined");
    let alive = |pid: &str| std::path::Path::new("/proc").join(pid).join("exe").read_link().is_ok();
    let pids: Vec<&str> = pids.split(' ').collect();
    assert!(pids.len() == 2 && pids.iter().all(|pid| alive(pid)), "{pids:?}");
    host.kill().unwrap();
    host.wait().unwrap();
    let start = std::time::Instant::now();
    for pid in pids {
        while alive(pid) && start.elapsed() < DEADLINE {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!alive(pid), "process {pid} survived its host");
    }
}

#[test]
fn a_launcher_that_waits_launches_with_all_layers_and_is_replaced_if_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let active =
        |report: &Report| report.rows().filter(|row| report.is_active(row.layer)).map(|row| row.layer).collect();
    let at_once = runtime.block_on(launcher().launch(&spec, DEADLINE)).unwrap();
    let expected: Vec<Layer> = active(&at_once.report);

    let waiting = launcher().start(&[]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let by_waiting = runtime.block_on(launcher().launch_by(waiting, &spec, DEADLINE)).unwrap();
    assert_eq!(active(&by_waiting.report), expected);

    let ended = launcher().start(&[]).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(ended.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let by_another = runtime.block_on(launcher().launch_by(ended, &spec, DEADLINE)).unwrap();
    assert_eq!(active(&by_another.report), expected);
}

#[test]
fn without_any_namespace_landlock_seccomp_and_the_user_still_hold() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret.txt");
    std::fs::write(&secret, "canary").unwrap();
    let mut attack = Attack::new(
        r#"
const [secret, host] = ARGS;
await tries({
  secret: () => Deno.readTextFileSync(secret),
  passwd: () => Deno.readTextFileSync("/etc/passwd"),
  environ: () => Deno.readTextFileSync(`/proc/${host}/environ`),
  write: () => Deno.writeTextFileSync(secret + ".new", "x"),
  socket: () => syscall(41, 2, 1, 0),
  fork: () => syscall(57),
  kill: () => syscall(62, host, 0),
  ptrace: () => syscall(101, 16, host, 0, 0),
  private: () => { Deno.writeTextFileSync(PRIVATE + "/own", "mine"); return Deno.readTextFileSync(PRIVATE + "/own"); },
});
"#,
    );
    attack.arguments = vec![secret.display().to_string(), std::process::id().to_string()];
    attack.without = vec![
        Layer::UserNamespace,
        Layer::MountNamespace,
        Layer::PidNamespace,
        Layer::NetNamespace,
        Layer::IpcNamespace,
        Layer::UtsNamespace,
        Layer::CgroupNamespace,
    ];
    // As root the process has a user of its own, which must reach its files; temporary folders are closed by default.
    use std::os::unix::fs::PermissionsExt;
    attack.folder_mode = Some(std::fs::Permissions::from_mode(0o711));
    let outcome = check(
        attack,
        &[
            ("secret", "DENIED"),
            ("passwd", "DENIED"),
            ("environ", "DENIED"),
            ("write", "DENIED"),
            ("socket", "DENIED"),
            ("fork", "DENIED"),
            ("kill", "DENIED"),
            ("ptrace", "DENIED"),
            ("private", "ALLOWED mine"),
        ],
    );
    assert!(!outcome.output.contains("canary"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
