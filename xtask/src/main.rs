//! Set-up that cargo alone cannot do.

fn main() {}
