//! Modules that were written without regard to the harness, driven by its library: filters of ours, and gates in Go and C++.

mod jwt_auth;
mod languages;
