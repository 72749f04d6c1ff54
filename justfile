# Every command, thin: recipes call cargo, which does the work. `just` alone lists them.

[private]
default:
    @{{ just_executable() }} --list --unsorted

# all that CI checks: format, lints, docs, filters, tests in every host
check *ARGS:
    cargo xtask test {{ ARGS }}

# bring the WebAssembly target, Envoy and Deno, and build the operators' engine
setup *ARGS:
    cargo xtask setup {{ ARGS }}

# one filter in two hosts: the same requests through the standalone host and through Envoy
demo *ARGS:
    cargo xtask demo {{ ARGS }}

# build filters to target/filters/NAME.wasm; all of them if none is named
build-filters *NAMES:
    cargo xtask build-filters {{ NAMES }}

# build the operators' engine on deno_core, as in `just runner --release`
runner *ARGS:
    cargo xtask runner {{ ARGS }}

# a filter to begin with, in filters/NAME, as part of the workspace
new-filter NAME:
    cargo run --quiet --bin portcullis -- new filter {{ NAME }} --path filters/{{ NAME }}
    cargo fmt --all

# one filter, as after each change of it: its module built in seconds, its scenarios on the simulated host
try-filter NAME *ARGS:
    cargo xtask build-filters --dev {{ NAME }}
    cargo run --quiet --bin portcullis -- test filters/{{ NAME }} {{ ARGS }}

# what a built filter imports from its host
imports NAME:
    cargo xtask imports {{ NAME }}

# tests alone; arguments go to `cargo test`, as in `just test --package portcullis-abi`
test *ARGS:
    cargo xtask test --only test -- {{ ARGS }}

# one filter: its unit tests, and its scenarios in every host
test-filter NAME:
    cargo xtask test --only test -- --package portcullis-{{ NAME }}
    cargo xtask test --only test -- --test scenarios ::{{ NAME }}::

# every scenario on the simulated host
e2e-harness:
    cargo xtask test --only test -- --test scenarios harness::

# every scenario on the standalone host, over sockets
e2e-host:
    cargo xtask test --only test -- --test scenarios host::

# every scenario in the real Envoy
e2e-envoy:
    cargo xtask test --only test -- --test scenarios envoy::

# one fuzz target for some seconds, as in `just fuzz hostcalls-http 600`; without arguments, a list of targets
fuzz *ARGS:
    cargo run --quiet --bin fuzz -- {{ ARGS }}

# run a policy in the standalone host, as in `just run docs/examples/demo/portcullis.yaml`
run CONFIG:
    cargo xtask test --only filters --only build
    "${CARGO_TARGET_DIR:-target}/debug/portcullis" serve {{ quote(CONFIG) }}

# one benchmark: `hostcalls` (host and guest by themselves), `policy` (a decision, natively), `abi` (the same as a guest), `end_to_end`
bench NAME *ARGS:
    cargo xtask build-filters
    cargo build --release --bin portcullis
    cargo bench --bench {{ NAME }} -- {{ ARGS }}

# renew what is made from the code: reference pages, schemas, Envoy examples
docs:
    UPDATE=1 UPDATE_SCHEMA=1 cargo test --test reference --test envoy_accepts --test configuration

# format everything
fmt:
    cargo fmt --all
    cargo fmt --manifest-path host/operators/runner/Cargo.toml

# cargo-deny: known vulnerabilities, licences, bans, sources
deny:
    @command -v cargo-deny > /dev/null || { echo "cargo-deny is not installed; get it with: cargo install cargo-deny --locked" >&2; exit 1; }
    cargo deny check
    cargo deny --manifest-path host/operators/runner/Cargo.toml check --config deny.toml
