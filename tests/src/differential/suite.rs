//! [`Suite`]: all rows, what came of each on each host, and the verdicts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};

use portcullis_harness::HostKind;

use super::outcome::{Outcome, difference};
use super::row::Row;
use super::stage::Stage;
use super::{page, rows};

/// What came of a row.
#[derive(Clone, Debug)]
pub struct Compared {
    /// In the real Envoy.
    pub envoy: Outcome,
    /// In our host.
    pub ours: Outcome,
}

impl Compared {
    /// Lines only Envoy has, with `-`, and those only our host has, with `+`.
    pub fn difference(&self) -> Vec<String> {
        difference(&self.envoy, &self.ours)
    }
}

/// All rows, each run at most once.
pub struct Suite {
    rows: Vec<Row>,
    results: Vec<OnceLock<Result<Compared, String>>>,
    stage: Mutex<Option<Result<Stage, String>>>,
}

impl Default for Suite {
    fn default() -> Suite {
        Suite::new()
    }
}

impl Suite {
    /// Nothing is started until a row is asked for.
    pub fn new() -> Suite {
        let rows = rows::all();
        let results = rows.iter().map(|_| OnceLock::new()).collect();
        Suite { rows, results, stage: Mutex::new(None) }
    }

    /// The rows, in the order of the page.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Runs a row on both hosts, unless that was done before.
    pub fn compared(&self, index: usize) -> Result<&Compared, String> {
        let (Some(row), Some(result)) = (self.rows.get(index), self.results.get(index)) else {
            return Err("there is no such row".to_owned());
        };
        result.get_or_init(|| self.run(row)).as_ref().map_err(Clone::clone)
    }

    fn run(&self, row: &Row) -> Result<Compared, String> {
        let mut stage = self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = stage.get_or_insert_with(|| Stage::start(&self.rows)).as_mut().map_err(|error| error.clone())?;
        Ok(Compared { envoy: stage.run(HostKind::Envoy, row)?, ours: stage.run(HostKind::Standalone, row)? })
    }

    /// Whether a row came out as declared.
    pub fn judge(&self, index: usize) -> Result<(), String> {
        let compared = self.compared(index)?;
        let Some(row) = self.rows.get(index) else { return Err("there is no such row".to_owned()) };
        let difference = compared.difference();
        match (difference.is_empty(), row.deviation) {
            (true, None) | (false, Some(_)) => Ok(()),
            (true, Some(name)) => Err(format!(
                "the deviation \"{name}\" does not show: both hosts have\n{}",
                compared.envoy.lines.join("\n")
            )),
            (false, None) => Err(format!(
                "{}\nEnvoy (-) and our host (+) differ:\n{}\nall of Envoy:\n{}",
                row.shows,
                difference.join("\n"),
                compared.envoy.lines.join("\n")
            )),
        }
    }

    /// The page, made of the outcomes of all rows.
    pub fn page(&self) -> Result<String, String> {
        let mut seen = Vec::new();
        for (index, row) in self.rows.iter().enumerate() {
            seen.push((row, self.compared(index).map_err(|error| format!("{}: {error}", row.id))?));
        }
        Ok(page::render(&seen))
    }

    /// What Envoy said, by area.
    pub fn record(&self) -> Result<BTreeMap<String, String>, String> {
        let mut areas: BTreeMap<String, String> = BTreeMap::new();
        for (index, row) in self.rows.iter().enumerate() {
            let seen = self.compared(index).map_err(|error| format!("{}: {error}", row.id))?;
            let text = areas.entry(row.area().to_owned()).or_default();
            let _ = write!(text, "== {}\n{}\n{}\n\n", row.id, row.shows, seen.envoy.lines.join("\n"));
        }
        Ok(areas)
    }

    /// Ends both hosts.
    pub fn end(&self) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
