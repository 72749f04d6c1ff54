//! Every rendering is configuration that the real Envoy takes.

mod support;

use portcullis_config::envoy::render_bootstrap;

#[test]
fn envoy_accepts_every_setting() {
    let folder = support::folder();
    let policy = support::policy_in(folder.path(), include_str!("policies/everything.yaml"));
    let rendering = render_bootstrap(&policy, &support::options(folder.path()));
    support::validate(folder.path(), &rendering).unwrap_or_else(|said| panic!("{said}"));
}
