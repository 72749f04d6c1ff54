# Every command, thin: recipes call cargo, which does the work. `just` alone lists them.

[private]
default:
    @{{ just_executable() }} --list --unsorted

# all that CI checks: format, lints, docs, filters, tests in every host
check *ARGS:
    cargo xtask test {{ ARGS }}

# bring the WebAssembly target, Envoy and Deno
setup *ARGS:
    cargo xtask setup {{ ARGS }}

# one filter in two hosts: the same requests through the standalone host and through Envoy
demo *ARGS:
    cargo xtask demo {{ ARGS }}

# build filters to target/filters/NAME.wasm; all of them if none is named
build-filters *NAMES:
    cargo xtask build-filters {{ NAMES }}

# what a built filter imports from its host
imports NAME:
    cargo xtask imports {{ NAME }}

# tests alone; arguments go to `cargo test`, as in `just test --package portcullis-abi`
test *ARGS:
    cargo xtask test --only test -- {{ if ARGS == "" { "--workspace" } else { ARGS } }}

# formats everything
fmt:
    cargo fmt --all

# cargo-deny: known vulnerabilities, licences, bans, sources
deny:
    @command -v cargo-deny > /dev/null || { echo "cargo-deny is not installed; get it with: cargo install cargo-deny --locked" >&2; exit 1; }
    cargo deny check
