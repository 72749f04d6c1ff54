//! All rows, by area: in the order in which a reader of the ABI meets them.

mod maps;

use super::row::Row;

/// All rows.
pub fn all() -> Vec<Row> {
    maps::rows()
}
