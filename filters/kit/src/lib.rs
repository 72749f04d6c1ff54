//! What the filters share: request view, decision, denial table, configuration errors, rules, adapter.
