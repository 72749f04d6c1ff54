//! The names of counters. All filters count the same things under the same names.

/// Something that is counted, for one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A request passed.
    Allowed,
    /// A request was denied, for this reason.
    Denied(&'static str),
    /// A request passed that would be denied, for this reason, if `mode` were `enforce`.
    ShadowDenied(&'static str),
    /// A request passed that could not be checked, because `failure_mode` is `allow`.
    FailureAllowed(&'static str),
}

/// The name of a counter, such as `portcullis_jwt_auth_denied_total.rule.orders.reason.credentials_rejected`. Proxies
/// know only names; what follows `.rule.` and `.reason.` becomes labels where metrics are shown.
pub fn counter_name(filter: &str, rule: &str, event: Event) -> String {
    let filter = filter.replace('-', "_");
    match event {
        Event::Allowed => format!("portcullis_{filter}_allowed_total.rule.{rule}"),
        Event::Denied(reason) => format!("portcullis_{filter}_denied_total.rule.{rule}.reason.{reason}"),
        Event::ShadowDenied(reason) => format!("portcullis_{filter}_shadow_denied_total.rule.{rule}.reason.{reason}"),
        Event::FailureAllowed(reason) => {
            format!("portcullis_{filter}_failure_allowed_total.rule.{rule}.reason.{reason}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_called_what_dashboards_expect() {
        for (event, name) in [
            (Event::Allowed, "portcullis_jwt_auth_allowed_total.rule.orders"),
            (Event::Denied("x_y"), "portcullis_jwt_auth_denied_total.rule.orders.reason.x_y"),
            (Event::ShadowDenied("x_y"), "portcullis_jwt_auth_shadow_denied_total.rule.orders.reason.x_y"),
            (Event::FailureAllowed("x_y"), "portcullis_jwt_auth_failure_allowed_total.rule.orders.reason.x_y"),
        ] {
            assert_eq!(counter_name("jwt-auth", "orders", event), name);
        }
    }
}
