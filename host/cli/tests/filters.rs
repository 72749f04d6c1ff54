//! What authors of filters use of the `portcullis` binary: `new`, `test`, `trace`, `package`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

fn portcullis(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    command.args(arguments).current_dir(folder).stdin(Stdio::null());
    command.env_remove("CARGO_TARGET_DIR").env_remove("PORTCULLIS_FILTERS");
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    portcullis(folder, arguments).output().expect("the binary to run")
}

/// Runs a command, whose exit code must be `code`; gives its standard output.
fn check(folder: &Path, arguments: &[&str], code: i32) -> String {
    let output = run(folder, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{out}\n{err}");
    out.into_owned()
}

/// A filter's folder with a built module in it; the guest of the harness's own tests.
struct Filter(tempfile::TempDir);

impl Filter {
    fn new() -> Filter {
        let folder = tempfile::tempdir().expect("a folder");
        let wasm = wat::parse_str(include_str!("../../harness/tests/guest.wat")).expect("a module");
        std::fs::write(folder.path().join("guest.wasm"), wasm).expect("a file");
        std::fs::create_dir(folder.path().join("scenarios")).expect("a folder");
        Filter(folder)
    }

    fn scenario(&self, file: &str, text: &str) -> PathBuf {
        let path = self.0.path().join("scenarios").join(file);
        std::fs::write(&path, format!("wasm: ../guest.wasm\n{text}")).expect("a file");
        path
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn name(&self) -> String {
        self.path().file_name().expect("a name").to_string_lossy().into_owned()
    }
}

const DENIED: &str = "name: a marked request is denied\nrequest: { path: /, fields: [[x-deny, '1']] }\n\
                      expect: { local_response: { status: 403 }, counters: { denied: 1 } }\n";
const WRONG: &str =
    "name: a plain request is denied\nrequest: { path: / }\nexpect: { local_response: { status: 403 } }\n";

#[test]
fn the_exit_code_says_whether_scenarios_passed_failed_or_could_not_be_run() {
    let filter = Filter::new();
    let said = check(filter.path(), &["test"], 2);
    assert!(said.contains("no scenario here"), "{said}");
    assert!(check(filter.path(), &["test", "nowhere"], 2).contains("there is no such file or folder"));
    filter.scenario("a.yaml", DENIED);
    let said = check(filter.path(), &["test"], 0);
    let name = filter.name();
    assert_eq!(said, format!("ok      harness::{name}  a marked request is denied\n\n1 passed, 0 failed\n"));
    filter.scenario("b.yaml", WRONG);
    let said = check(filter.path(), &["test"], 1);
    assert!(
        said.contains("local_response.status: expected 403, got 200") && said.ends_with("1 passed, 1 failed\n"),
        "{said}"
    );
    assert!(said.contains("proxy_on_request_headers(context: 2"), "the way there is shown:\n{said}");
    check(filter.path(), &["test", "--only", "marked"], 0);
    check(filter.path(), &["test", "--only", "zebra"], 2);
}

#[test]
fn reports_are_for_people_ci_and_programs() {
    let filter = Filter::new();
    filter.scenario("a.yaml", DENIED);
    filter.scenario("b.yaml", WRONG);
    let junit = check(filter.path(), &["test", "--format", "junit"], 1);
    assert!(junit.starts_with("<?xml") && junit.contains("tests=\"2\" failures=\"1\""), "{junit}");
    let json: Value = serde_json::from_str(&check(filter.path(), &["test", "--format", "json"], 1)).expect("JSON");
    assert_eq!((&json["passed"], &json["failed"]), (&1.into(), &1.into()));
    assert_eq!(json["scenarios"][1]["verdict"], "failed");
    let said = check(filter.path(), &["test", "--junit", "report.xml"], 1);
    assert!(said.contains("1 passed, 1 failed"), "{said}");
    let file = std::fs::read_to_string(filter.path().join("report.xml")).expect("the report");
    assert!(file.contains("<failure message=\"local_response.status: expected 403, got 200\">"), "{file}");
}

#[test]
fn update_writes_what_comes_of_scenarios() {
    let filter = Filter::new();
    let missing =
        filter.scenario("a.yaml", "# nothing expected yet\nname: a\nrequest: { path: /, fields: [[x-deny, '1']] }\n");
    let wrong = filter.scenario("b.yaml", WRONG);
    let said = check(filter.path(), &["test", "--only", "a.yaml"], 1);
    assert!(said.contains("`expect` is missing") && said.contains("--update"), "{said}");
    let said = check(filter.path(), &["test", "--update"], 0);
    assert!(said.contains("updated  a\n") && said.ends_with("2 passed, 0 failed\n"), "{said}");
    let read = |path: &Path| std::fs::read_to_string(path).expect("a scenario");
    assert_eq!(
        read(&missing),
        "wasm: ../guest.wasm\n# nothing expected yet\nname: a\nrequest: { path: /, fields: [[x-deny, '1']] }\n\
         expect:\n  local_response: { status: 403, fields: { content-type: text/plain }, body: \"no\" }\n  \
         counters: { denied: 1 }\n"
    );
    assert!(
        read(&wrong)
            .contains("expect: { response: { status: 200 }, upstream: { path: /, fields: { x-seen: \"1\" } } }")
    );
    check(filter.path(), &["test"], 0);
    let said = check(filter.path(), &["test", "--update"], 0);
    assert!(!said.contains("updated"), "nothing is left to write:\n{said}");
}

/// A child that ends with the test.
struct Watching(Child);

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn watch_runs_again_when_a_scenario_changes_or_appears() {
    let filter = Filter::new();
    let scenario = filter.scenario("a.yaml", WRONG);
    let child = portcullis(filter.path(), &["test", "--watch"]).stdout(Stdio::piped()).spawn().expect("to start");
    let mut watching = Watching(child);
    let mut lines = BufReader::new(watching.0.stdout.take().expect("standard output")).lines();
    let mut wait_for = |what: &str| {
        for line in lines.by_ref() {
            if line.expect("a line").contains(what) {
                return;
            }
        }
        panic!("it ended without `{what}`");
    };
    wait_for("0 passed, 1 failed");
    wait_for("waiting for a change");
    let text = std::fs::read_to_string(&scenario)
        .expect("the scenario")
        .replace("local_response: { status: 403", "response: { status: 200");
    std::fs::write(&scenario, text).expect("to write");
    wait_for("1 passed, 0 failed");
    wait_for("waiting for a change");
    filter.scenario("b.yaml", DENIED);
    wait_for("2 passed, 0 failed");
    wait_for("waiting for a change");
    // A module that was built anew.
    let wasm = std::fs::read(filter.path().join("guest.wasm")).expect("the module");
    std::fs::write(filter.path().join("guest.wasm"), wasm).expect("to write");
    wait_for("2 passed, 0 failed");
}

#[test]
fn watch_runs_again_whichever_way_the_module_is_built() {
    let filter = Filter::new();
    let folder = filter.path().join("a-guard");
    std::fs::create_dir_all(folder.join("scenarios")).expect("a folder");
    std::fs::write(folder.join("scenarios/a.yaml"), DENIED).expect("a file");
    std::fs::write(folder.join("Cargo.toml"), "[package]").expect("a file");
    let wasm = std::fs::read(filter.path().join("guest.wasm")).expect("the module");
    let child = portcullis(&folder, &["test", "--watch"]).stdout(Stdio::piped()).spawn().expect("to start");
    let mut watching = Watching(child);
    let mut lines = BufReader::new(watching.0.stdout.take().expect("standard output")).lines();
    let mut wait_for = |what: &str| {
        let found = lines.by_ref().map(|line| line.expect("a line")).any(|line| line.contains(what));
        assert!(found, "it ended without `{what}`");
    };
    wait_for("the filter `a-guard` is not built");
    wait_for("waiting for a change");
    // Cargo makes folders first, and the module when it is done; folder by folder there may be a run in between.
    for profile in ["release", "debug"] {
        let built = folder.join("target/wasm32-wasip1").join(profile);
        std::fs::create_dir_all(&built).expect("a folder");
        std::thread::sleep(std::time::Duration::from_millis(300));
        std::fs::write(built.join("a_guard.wasm"), &wasm).expect("a file");
        wait_for("1 passed, 0 failed");
        wait_for("waiting for a change");
        std::fs::remove_file(built.join("a_guard.wasm")).expect("to remove");
        wait_for("is not built");
        wait_for("waiting for a change");
    }
}

#[test]
fn trace_shows_a_requests_way_through_a_module() {
    let filter = Filter::new();
    let arguments =
        ["trace", "guest.wasm", "--request", "POST /a", "-H", "authorization: Bearer s3cret", "-H", "x-deny: 1"];
    let said = check(filter.path(), &arguments, 0);
    for line in [
        "  guest  proxy_on_configure(root: 1, bytes: 0)\n",
        "      proxy_define_metric(kind: counter, name: \"denied\") -> metric: 4\n",
        "POST /a\n",
        "  guest #2  proxy_on_request_headers(context: 2, fields: 8, end_of_stream: true)\n",
        "      proxy_send_local_response(status: 403,",
        "  response: 403\n",
    ] {
        assert!(said.contains(line), "no `{line}` in\n{said}");
    }
    assert!(!said.contains("s3cret"), "{said}");
    let json: Value =
        serde_json::from_str(&check(filter.path(), &["trace", "guest.wasm", "--format", "json"], 0)).expect("JSON");
    assert_eq!(json["requests"][0]["status"], 200);
    assert!(json["requests"][0]["trace"].as_array().is_some_and(|events| events.len() > 5), "{json:#}");

    filter.scenario("a.yaml", DENIED);
    let said = check(filter.path(), &["trace", "scenarios/a.yaml", "--requests-only"], 0);
    assert!(said.starts_with("GET /\n") && said.contains("x-deny"), "{said}");
    std::fs::write(filter.path().join("bad.txt"), "bad").expect("a file");
    let output = run(filter.path(), &["trace", "guest.wasm", "--configuration", "bad.txt"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("refused its configuration") && said.contains("proxy_on_configure"), "{said}");
    check(filter.path(), &["trace", "guest.wasm", "--request", "a b c"], 2);
}

/// An OCI image layout, read by the letter of the specification (image-layout.md, manifest.md, descriptor.md).
struct Layout(BTreeMap<String, Vec<u8>>);

impl Layout {
    fn of_folder(folder: &Path) -> Layout {
        fn read(folder: &Path, below: &str, files: &mut BTreeMap<String, Vec<u8>>) {
            for entry in std::fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                let name = format!("{below}{}", path.file_name().expect("a name").to_string_lossy());
                if path.is_dir() {
                    read(&path, &format!("{name}/"), files);
                } else {
                    files.insert(name, std::fs::read(&path).expect("a file"));
                }
            }
        }
        let mut files = BTreeMap::new();
        read(folder, "", &mut files);
        Layout(files)
    }

    fn of_tar(file: &Path) -> Layout {
        let mut archive = tar::Archive::new(std::fs::File::open(file).expect("an archive"));
        let entries = archive.entries().expect("entries").map(|entry| {
            let mut entry = entry.expect("an entry");
            assert_eq!(entry.header().mtime().ok(), Some(0), "nothing tells when it was made");
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).expect("a file");
            (entry.path().expect("a name").to_string_lossy().into_owned(), bytes)
        });
        Layout(entries.collect())
    }

    /// A blob by its descriptor, whose digest and size must be true.
    fn blob(&self, descriptor: &Value) -> &[u8] {
        let digest = descriptor["digest"].as_str().expect("a digest");
        let hex = digest.strip_prefix("sha256:").expect("SHA-256");
        assert!(hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')), "{digest}");
        let blob = &self.0[&format!("blobs/sha256/{hex}")];
        let actual: String = Sha256::digest(blob).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(actual, hex);
        assert_eq!(descriptor["size"].as_u64(), Some(blob.len() as u64));
        blob
    }

    /// The one manifest, which must be that of `digest` under `tag`.
    fn manifest(&self, tag: &str, digest: &str, media_type: &str) -> Value {
        let parse = |bytes: &[u8]| -> Value { serde_json::from_slice(bytes).expect("JSON") };
        assert_eq!(parse(&self.0["oci-layout"])["imageLayoutVersion"], "1.0.0");
        let index = parse(&self.0["index.json"]);
        assert_eq!(
            (&index["schemaVersion"], &index["mediaType"]),
            (&2.into(), &"application/vnd.oci.image.index.v1+json".into())
        );
        let [descriptor] = index["manifests"].as_array().expect("manifests").as_slice() else { panic!("{index}") };
        assert_eq!(descriptor["mediaType"], media_type);
        assert_eq!(descriptor["digest"], digest);
        assert_eq!(descriptor["annotations"]["org.opencontainers.image.ref.name"], tag);
        let manifest = parse(self.blob(descriptor));
        assert_eq!((&manifest["schemaVersion"], &manifest["mediaType"]), (&2.into(), &media_type.into()));
        manifest
    }

    /// Every blob is named by something.
    fn check_blobs(&self, count: usize) {
        assert_eq!(self.0.keys().filter(|name| name.starts_with("blobs/")).count(), count);
        assert_eq!(self.0.len(), count + 2);
    }
}

/// Files of a layer.
fn unpacked(layer: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(layer));
    let files = archive.entries().expect("entries").map(|entry| {
        let mut entry = entry.expect("an entry");
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("a file");
        (entry.path().expect("a name").to_string_lossy().into_owned(), bytes)
    });
    files.collect()
}

fn parsed(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("JSON")
}

#[test]
fn package_makes_images_that_hold_the_module_and_are_the_same_each_time() {
    let filter = Filter::new();
    let wasm = std::fs::read(filter.path().join("guest.wasm")).expect("the module");
    let package = |arguments: &[&str]| {
        let all: Vec<&str> = ["package", "guest.wasm"].iter().chain(arguments).copied().collect();
        check(filter.path(), &all, 0).trim_end().to_owned()
    };

    let digest = package(&["-o", "image", "--tag", "1.0", "--annotation", "org.opencontainers.image.version=1.0"]);
    let layout = Layout::of_folder(&filter.path().join("image"));
    let manifest = layout.manifest("1.0", &digest, "application/vnd.oci.image.manifest.v1+json");
    layout.check_blobs(3);
    assert_eq!(manifest["annotations"]["module.wasm.image/variant"], "compat");
    assert_eq!(manifest["annotations"]["org.opencontainers.image.version"], "1.0");
    assert_eq!(manifest["annotations"]["org.opencontainers.image.title"], "guest");
    let [layer] = manifest["layers"].as_array().expect("layers").as_slice() else { panic!("{manifest}") };
    assert_eq!(layer["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
    let files = unpacked(layout.blob(layer));
    assert_eq!(files["plugin.wasm"], wasm);
    assert_eq!(parsed(&files["runtime-config.json"])["type"], "envoy_proxy");
    assert_eq!(manifest["config"]["mediaType"], "application/vnd.oci.image.config.v1+json");
    let config = parsed(layout.blob(&manifest["config"]));
    assert!(config["architecture"].is_string() && config["os"].is_string(), "{config}");
    let [diff_id] = config["rootfs"]["diff_ids"].as_array().expect("diff ids").as_slice() else { panic!("{config}") };
    let mut tar = Vec::new();
    flate2::read::GzDecoder::new(layout.blob(layer)).read_to_end(&mut tar).expect("gzip");
    let tar_digest: String = Sha256::digest(&tar).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(*diff_id, Value::from(format!("sha256:{tar_digest}")));

    // Again, over the first, and as an archive: the same.
    assert_eq!(
        package(&["-o", "image", "--tag", "1.0", "--annotation", "org.opencontainers.image.version=1.0"]),
        digest
    );
    assert_eq!(
        package(&["-o", "image.tar", "--tag", "x", "--annotation", "org.opencontainers.image.version=1.0"]),
        digest
    );
    let layout = Layout::of_tar(&filter.path().join("image.tar"));
    layout.manifest("x", &digest, "application/vnd.oci.image.manifest.v1+json");

    let digest = package(&["-o", "artifact", "--variant", "artifact", "--root-id", "main"]);
    let layout = Layout::of_folder(&filter.path().join("artifact"));
    let manifest = layout.manifest("latest", &digest, "application/vnd.oci.image.manifest.v1+json");
    layout.check_blobs(4);
    let [runtime, module] = manifest["layers"].as_array().expect("layers").as_slice() else { panic!("{manifest}") };
    assert_eq!(module["mediaType"], "application/vnd.module.wasm.content.layer.v1+wasm");
    assert_eq!(layout.blob(module), wasm);
    assert_eq!(runtime["mediaType"], "application/vnd.module.wasm.config.v1+json");
    let runtime = parsed(layout.blob(runtime));
    assert_eq!((&runtime["config"]["rootIds"][0], &runtime["abiVersions"][0]), (&"main".into(), &"0.2.1".into()));
    assert_eq!(layout.blob(&manifest["config"]), b"{}");
}

#[test]
fn package_refuses_what_is_no_filter_and_what_is_not_its_own() {
    let filter = Filter::new();
    std::fs::write(filter.path().join("empty.wasm"), b"\0asm\x01\0\0\0").expect("a file");
    let output = run(filter.path(), &["package", "empty.wasm", "-o", "image"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.contains("proxy_abi_version_0_2_1"), "{said}");
    std::fs::create_dir(filter.path().join("mine")).expect("a folder");
    std::fs::write(filter.path().join("mine/letter.txt"), "dear").expect("a file");
    let output = run(filter.path(), &["package", "guest.wasm", "-o", "mine"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && said.contains("not empty"), "{said}");
    assert!(filter.path().join("mine/letter.txt").exists());
    check(filter.path(), &["package", "guest.wasm", "-o", "d", "--annotation", "=b"], 2);
    assert!(!filter.path().join("d").exists());
}

/// The name of a filter is that of its folder, also where a path does not show it.
#[test]
fn a_built_module_is_found_from_inside_the_filters_folder() {
    let filter = Filter::new();
    let folder = filter.path().join("a-guard");
    std::fs::create_dir_all(folder.join("scenarios")).expect("a folder");
    std::fs::write(folder.join("scenarios/a.yaml"), DENIED).expect("a file");
    let built = folder.join("target/wasm32-wasip1/release");
    std::fs::create_dir_all(&built).expect("a folder");
    std::fs::copy(filter.path().join("guest.wasm"), built.join("a_guard.wasm")).expect("a file");
    for path in ["scenarios/a.yaml", "scenarios", "."] {
        let said = check(&folder, &["test", path], 0);
        assert!(said.starts_with("ok      harness::a-guard  "), "{said}");
    }
    check(&folder, &["trace", "scenarios/a.yaml"], 0);
    // Until somebody changes what it was built from.
    std::fs::create_dir(folder.join("src")).expect("a folder");
    std::fs::write(folder.join("Cargo.toml"), "[package]").expect("a file");
    let said = check(&folder, &["test"], 0);
    let warning =
        "warning: a-guard: `Cargo.toml` was changed after the module was built, so this tests what it was before\n";
    assert!(said.contains(warning), "{said}");
}

#[test]
fn a_mistake_in_a_scenario_says_where_it_is_what_is_wrong_and_what_to_do() {
    let filter = Filter::new();
    let name = filter.name();
    for (text, said) in [
        ("", "scenarios/a.yaml:1:1: there is nothing in it\n"),
        (
            "name: a\n wasm: b\n",
            "scenarios/a.yaml:2:6: mapping values are not allowed in this context\n          hint: keys of one mapping begin",
        ),
        (
            "name: a\nrequst: {}\n",
            "scenarios/a.yaml:2:1: unknown key `requst`\n          hint: did you mean `request`?",
        ),
        (
            "name: a\nrequest: { path: /, fields: { x: y } }\n",
            "scenarios/a.yaml:2:29: request.fields: a list is expected here\n          hint: write `[a, b]`",
        ),
        (
            "name: a\nrequest: { path: / }\nexpect: { response: { status: two } }\n",
            "scenarios/a.yaml:3:31: expect.response.status: a whole number is expected here\n",
        ),
        (
            "name: a\nwasm: ../nope.wasm\nrequest: { path: / }\nexpect: { upstream: not_called }\n",
            "scenarios/../nope.wasm: cannot be read: there is no such file\n          hint: build it first",
        ),
        (
            "name: a\nconfig: nope.json\nrequest: { path: / }\nexpect: { upstream: not_called }\n",
            "scenarios/a.yaml: config: `nope.json` cannot be read: there is no such file\n          hint: paths are relative",
        ),
    ] {
        std::fs::write(filter.path().join("scenarios/a.yaml"), text).expect("a file");
        let shown = check(filter.path(), &["test"], 1);
        assert!(shown.starts_with(&format!("FAILED  harness::{name}  a")), "{shown}");
        assert!(shown.contains(&format!("\n        {said}")), "no `{said}` in\n{shown}");
    }
    // Nothing ran, so nothing failed either.
    let shown = check(filter.path(), &["test", "nowhere"], 2);
    assert_eq!(shown, "error: nowhere: there is no such file or folder\n\n0 passed, 0 failed, 1 error\n");
    let output = run(filter.path(), &["trace", "scenarios"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(said, "error: scenarios: cannot be read: it is a directory\n  hint: name one file\n");
}

#[test]
fn without_envoy_its_scenarios_do_not_run_and_the_way_to_get_it_is_said() {
    let filter = Filter::new();
    filter.scenario("a.yaml", DENIED);
    let mut command = portcullis(filter.path(), &["test", "--host", "envoy"]);
    let output = command.env("PORTCULLIS_ENVOY", "/nowhere/envoy").output().expect("to run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(
        said,
        "error: Envoy is missing: `PORTCULLIS_ENVOY` names `/nowhere/envoy`, which is not a file\n  hint: run `cargo xtask setup`, or \
         correct the variable\n"
    );
}

#[test]
fn editors_get_the_schemas_that_the_documentation_has() {
    let folder = tempfile::tempdir().expect("a folder");
    for (of, file) in [("scenario", "scenario.schema.json"), ("policy", "portcullis.schema.json")] {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(file);
        let documented = std::fs::read_to_string(docs).expect("a schema");
        assert_eq!(check(folder.path(), &["schema", of], 0), documented);
    }
}

#[test]
fn new_refuses_what_it_cannot_make() {
    let folder = tempfile::tempdir().expect("a folder");
    let refused = |arguments: &[&str]| {
        let output = run(folder.path(), &[&["new", "filter"], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(refused(&["Tenant"]).contains("`Tenant` is no name for a filter\n  hint: use 1 to 50 lower-case letters"));
    assert!(refused(&["serde"]).contains("means something else to cargo"));
    assert!(refused(&["a-guard", "--kit", "nowhere"]).contains("hint: name the folder of a checkout"));
    assert!(refused(&["a-guard", "--kit", "."]).contains("`.` holds no `filters/kit`"));
    std::fs::create_dir_all(folder.path().join("a-guard/src")).expect("a folder");
    assert!(refused(&["a-guard"]).contains("exists already\n  hint: name another folder with `--path`"));
    let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").collect();
    assert_eq!(left.len(), 1, "nothing was made: {left:?}");
}

#[test]
fn new_takes_the_kit_from_a_checkout_or_a_repository() {
    let folder = tempfile::tempdir().expect("a folder");
    let manifest = |kit: &str, path: &str| {
        check(folder.path(), &["new", "filter", "a-guard", "--kit", kit, "--path", path], 0);
        std::fs::read_to_string(folder.path().join(path).join("Cargo.toml")).expect("a manifest")
    };
    let checkout = std::fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).expect("the checkout");
    let kit = checkout.join("filters/kit").display().to_string();
    let written = manifest(&checkout.display().to_string(), "here");
    assert!(written.contains(&format!("portcullis-kit = {{ path = \"{kit}\" }}\n")), "{written}");
    let written = manifest("https://git.example/portcullis", "there");
    let from_git = "portcullis-kit = { git = \"https://git.example/portcullis\", features = [\"testing\"] }\n";
    assert!(written.contains(from_git), "{written}");
}

#[test]
fn manifests_attach_filters_to_what_is_named_and_say_what_is_missing() {
    let filter = Filter::new();
    std::fs::write(
        filter.path().join("portcullis.yaml"),
        "version: 1\nlisteners: [{ name: public, address: \"127.0.0.1:8080\" }]\n\
         filters: [{ name: guard, wasm: guest.wasm, configuration: { a: 1 } }]\n\
         upstreams: { api: { endpoints: [\"127.0.0.1:9000\"] } }\n\
         routes: [{ name: all, match: { path: { prefix: / } }, upstream: api }]\n",
    )
    .expect("a policy");
    let digest = check(filter.path(), &["package", "guest.wasm", "-o", "image.tar"], 0);
    let image = format!("guard=registry.example/guard@{}", digest.trim());
    let said = check(filter.path(), &["manifests", "istio", "--image", &image, "--namespace", "edge"], 0);
    let url = format!("  url: \"oci://registry.example/guard@{}\"\n", digest.trim());
    assert!(said.contains("kind: WasmPlugin\n") && said.contains(&url) && said.contains("namespace: edge\n"), "{said}");
    let gateway = ["manifests", "envoy-gateway", "--image", &image, "--target", "Gateway/edge", "-o", "out.yaml"];
    assert_eq!(check(filter.path(), &gateway, 0), "");
    let written = std::fs::read_to_string(filter.path().join("out.yaml")).expect("a file");
    assert!(
        written.contains("kind: EnvoyExtensionPolicy\n")
            && written.contains("config:\n")
            && written.contains(" a: 1\n"),
        "{written}"
    );
    for (arguments, problem) in [
        (&["istio"][..], "filter `guard`: it is not said where its module is"),
        (&["istio", "--image", "guard=guard"], "an image begins with its registry"),
        (&["istio", "--image", "guard"], "write FILTER=IMAGE"),
        (&["envoy-gateway", "--image", &image], "it is not said what the filters are attached to"),
        (&["envoy-gateway", "--image", &image, "--target", "Service/a"], "write a kind and a name"),
        (&["istio", "--image", &image, "--namespace", "A B"], "Kubernetes takes no such name"),
    ] {
        let output = run(filter.path(), &[&["manifests"], arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(problem), "{problem}:\n{said}");
    }
}
