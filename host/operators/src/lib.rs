//! Operators: customers' TypeScript handlers, one confined process each.
