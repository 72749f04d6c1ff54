//! Guests that loop, crash, flood, lie and never come to an end, in the built program: it stays up, other routes are served meanwhile,
//! and the next request meets a fresh guest.

mod compiling;
mod crashing;
mod flooding;
mod lying;
mod support;
