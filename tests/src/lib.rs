//! One scenario, three hosts; attacks; the demo.
