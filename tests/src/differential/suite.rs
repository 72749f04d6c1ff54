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
    /// Which of the stages each row is run on.
    places: Vec<usize>,
    /// Hosts take so many plugins and no more, so there are several.
    stages: Vec<((HostKind, usize), Place)>,
}

/// A stage once it was started, or why it could not be.
type Place = Mutex<Option<Result<Stage, String>>>;

/// Plugins that one stage holds, beside those that rows share.
const PLUGINS_MAX: usize = 40;

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
        let mut plugins = 0;
        let places: Vec<usize> = rows
            .iter()
            .map(|row| {
                plugins += if row.alone { 0 } else { row.plugins.len() };
                plugins / PLUGINS_MAX
            })
            .collect();
        let numbers = 0..=plugins / PLUGINS_MAX;
        let stages = numbers.flat_map(|number| [(HostKind::Envoy, number), (HostKind::Standalone, number)]);
        let stages = stages.map(|key| (key, Mutex::new(None))).collect();
        Suite { rows, results, places, stages }
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
        result.get_or_init(|| self.run(index, row)).as_ref().map_err(Clone::clone)
    }

    /// Both hosts at once, each with upstreams of its own.
    fn run(&self, index: usize, row: &Row) -> Result<Compared, String> {
        let (envoy, ours) = std::thread::scope(|scope| {
            let envoy = scope.spawn(|| self.run_on(HostKind::Envoy, index, row));
            let ours = self.run_on(HostKind::Standalone, index, row);
            (envoy.join().unwrap_or_else(|_| Err("running Envoy panicked".to_owned())), ours)
        });
        Ok(Compared { envoy: envoy?, ours: ours? })
    }

    fn run_on(&self, host: HostKind, index: usize, row: &Row) -> Result<Outcome, String> {
        if row.alone {
            return Stage::run_alone(host, row);
        }
        let number = self.places.get(index).copied().unwrap_or_default();
        let place = self.stages.iter().find(|(key, _)| *key == (host, number)).map(|(_, place)| place);
        let mut place = place.ok_or("there is no such stage")?.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = place.get_or_insert_with(|| self.start(host, number)).as_mut().map_err(|error| error.clone())?;
        let outcome = stage.run(row);
        if outcome.is_err() && !stage.is_running() {
            // A row that ends a host must not fail those after it.
            *place = None;
        }
        outcome
    }

    fn start(&self, host: HostKind, number: usize) -> Result<Stage, String> {
        let rows = self.rows.iter().zip(&self.places).filter(|(row, place)| !row.alone && **place == number);
        Stage::start(host, rows.map(|(row, _)| row))
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
        for (_, stage) in &self.stages {
            *stage.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}
