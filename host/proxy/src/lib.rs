//! Listeners, routes, the filter chain, upstreams.
