//! [`Row`]: one question to both hosts.

use std::time::Duration;

use portcullis_harness::{Callout, CalloutAnswer, FieldLines, RequestPlan, ResponsePlan};
use serde_json::{Value, json};

use super::conversation::Move;

/// One question, and everything that is needed to ask it.
#[derive(Clone, Debug)]
pub struct Row {
    /// Area and question, such as `get_header_map_value/absent`.
    pub id: String,
    /// The fact that it shows, as a sentence about Envoy.
    pub shows: &'static str,
    /// What the guest does, in the language of `tests/guests/calls`.
    pub script: String,
    /// The plugins on the way of its requests, in order. Empty: one that all such rows share.
    pub plugins: Vec<Plugin>,
    /// The plugin that rows without plugins share stops everything when it stops at headers.
    pub strict: bool,
    /// Its requests, in order.
    pub steps: Vec<Step>,
    /// Instead of requests: what happens on a TCP connection through its plugins.
    pub conversation: Vec<Move>,
    /// The upstream of that connection.
    pub origin: &'static str,
    /// Wait for this line of the guest's.
    pub until: Option<&'static str>,
    /// Streams end without a word, since their VM is gone.
    pub dies: bool,
    /// It has hosts of its own, which may refuse to start, or end.
    pub alone: bool,
    /// What the root context tells is part of the outcome.
    pub root: bool,
    /// In how many pieces a body comes is of no account.
    pub coarse: bool,
    /// Nobody waits for its callouts, so that the upstream may see them or not.
    pub fire_and_forget: bool,
    /// What the upstream got is part of the outcome.
    pub upstream: bool,
    /// Metrics with these names are part of the outcome.
    pub metrics: Vec<&'static str>,
    /// The deviation in `docs/abi.md` that makes the outcomes differ.
    pub deviation: Option<&'static str>,
}

/// A plugin of a row's own.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// What it is called, within its row.
    pub name: &'static str,
    /// The module: that of a guest in `tests/guests`, or text in WebAssembly's own format.
    pub module: Module,
    /// Its plugin configuration.
    pub configuration: String,
    /// Settings as in a policy file.
    pub settings: Value,
}

/// Where a module comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Module {
    /// A guest by its name.
    Guest(&'static str),
    /// `gate.wasm` in the folder of a guest in another language.
    Prebuilt(&'static str),
    /// In WebAssembly text format.
    Text(String),
}

/// One request, and what the servers behind the host answer.
#[derive(Clone, Debug)]
pub struct Step {
    /// The request; its path is taken below the row's own.
    pub request: RequestPlan,
    /// Goes instead of the row's script.
    pub script: Option<String>,
    /// What the origin answers.
    pub response: ResponsePlan,
    /// What the upstream `callee` answers.
    pub callouts: Vec<Callout>,
    /// Send it again until it is answered with this status.
    pub until_status: Option<u16>,
    /// How many requests the origin is waited for; some come after the client has its answer.
    pub await_upstream: usize,
}

impl Default for Step {
    fn default() -> Step {
        Step {
            request: RequestPlan::new("GET", ""),
            script: None,
            response: ResponsePlan::default(),
            callouts: Vec::new(),
            until_status: None,
            await_upstream: 0,
        }
    }
}

impl Step {
    /// `GET` without anything special.
    pub fn get() -> Step {
        Step::default()
    }

    /// `POST` with a body in these pieces.
    pub fn post(pieces: &[&str]) -> Step {
        Step::default().method("POST").body(pieces)
    }

    /// Another method.
    #[must_use]
    pub fn method(mut self, method: &str) -> Step {
        self.request.method = method.to_owned();
        self
    }

    /// What follows the row's own path.
    #[must_use]
    pub fn path(mut self, path: &str) -> Step {
        self.request.path = path.to_owned();
        self
    }

    /// A body in pieces; several are sent one at a time, when the one before has been told.
    #[must_use]
    pub fn body(mut self, pieces: &[&str]) -> Step {
        self.request.body = pieces.iter().map(|piece| piece.as_bytes().to_vec()).collect();
        self
    }

    /// A field of the request.
    #[must_use]
    pub fn field(mut self, name: &str, value: impl AsRef<[u8]>) -> Step {
        self.request.fields.push(name, value.as_ref());
        self
    }

    /// A trailer of the request.
    #[must_use]
    pub fn trailer(mut self, name: &str, value: &str) -> Step {
        self.request.trailers.push(name, value);
        self
    }

    /// Instead of the row's script.
    #[must_use]
    pub fn script(mut self, script: &str) -> Step {
        self.script = Some(script.to_owned());
        self
    }

    /// What the origin answers: status, fields, body in pieces.
    #[must_use]
    pub fn answer(mut self, status: u16, fields: &[(&str, &str)], pieces: &[&str]) -> Step {
        self.response.status = status;
        self.response.fields = fields.iter().copied().collect();
        self.response.body = pieces.iter().map(|piece| piece.as_bytes().to_vec()).collect();
        self
    }

    /// A trailer of the origin's answer.
    #[must_use]
    pub fn answer_trailer(mut self, name: &str, value: &str) -> Step {
        self.response.trailers.push(name, value);
        self
    }

    /// What the upstream `callee` answers, from here on.
    #[must_use]
    pub fn callee(mut self, status: u16, fields: &[(&str, &str)], body: &str) -> Step {
        let response = ResponsePlan {
            status,
            fields: fields.iter().copied().collect(),
            body: vec![body.as_bytes().to_vec()],
            trailers: FieldLines::new(),
        };
        self.callouts.push(Callout::always(response));
        self
    }

    /// The upstream `callee` takes so long, so that what is on its way meanwhile comes first.
    #[must_use]
    pub fn callee_takes(mut self, delay: Duration) -> Step {
        self.callouts.iter_mut().for_each(|callout| callout.delay = delay);
        self
    }

    /// The upstream `callee` never answers.
    #[must_use]
    pub fn callee_is_silent(mut self) -> Step {
        self.callouts.push(Callout::always(CalloutAnswer::Timeout));
        self
    }

    /// The upstream `callee` closes the connection instead of answering.
    #[must_use]
    pub fn callee_hangs_up(mut self) -> Step {
        self.callouts.push(Callout::always(CalloutAnswer::Refused));
        self
    }

    /// Send it again until it is answered with this status.
    #[must_use]
    pub fn until_status(mut self, status: u16) -> Step {
        self.until_status = Some(status);
        self
    }

    /// The origin sees so many requests, some perhaps only after the client has its answer.
    #[must_use]
    pub fn await_upstream(mut self, requests: usize) -> Step {
        self.await_upstream = requests;
        self
    }
}

impl Row {
    /// A row with one `GET`.
    pub fn new(id: impl Into<String>, shows: &'static str) -> Row {
        Row {
            id: id.into(),
            shows,
            script: String::new(),
            plugins: Vec::new(),
            strict: false,
            steps: vec![Step::get()],
            conversation: Vec::new(),
            origin: "tcp",
            until: None,
            dies: false,
            alone: false,
            root: false,
            coarse: false,
            fire_and_forget: false,
            upstream: false,
            metrics: Vec::new(),
            deviation: None,
        }
    }

    /// What the guest does.
    #[must_use]
    pub fn script(mut self, script: impl Into<String>) -> Row {
        self.script = script.into();
        self
    }

    /// Other requests than the one `GET`; none at all for what a plugin does by itself.
    #[must_use]
    pub fn steps(mut self, steps: impl IntoIterator<Item = Step>) -> Row {
        self.steps = steps.into_iter().collect();
        self
    }

    /// A TCP connection, instead of requests, on which this happens. The script is the configuration of its plugins.
    #[must_use]
    pub fn tcp(mut self, moves: impl IntoIterator<Item = Move>) -> Row {
        self.steps.clear();
        self.conversation = moves.into_iter().collect();
        if self.plugins.is_empty() {
            self.plugins.push(Plugin::new("own"));
        }
        self
    }

    /// Nobody listens at the upstream of its TCP connection.
    #[must_use]
    pub fn without_origin(mut self) -> Row {
        self.origin = "tcp-closed";
        self
    }

    /// Whether it is about a TCP connection.
    pub fn is_tcp(&self) -> bool {
        !self.conversation.is_empty()
    }

    /// A plugin of the row's own, further along the way of requests than those before.
    #[must_use]
    pub fn plugin(mut self, plugin: Plugin) -> Row {
        self.plugins.push(plugin);
        self
    }

    /// A plugin of the row's own that does what `configuration` says; what its root context tells is part of the
    /// outcome.
    #[must_use]
    pub fn root(mut self, configuration: &str) -> Row {
        self.root = true;
        self.plugin(Plugin::new("own").configuration(configuration))
    }

    /// Its plugins get this configuration.
    #[must_use]
    pub fn configured(mut self, configuration: &str) -> Row {
        self.plugins.iter_mut().for_each(|plugin| plugin.configuration = configuration.to_owned());
        self
    }

    /// What the root context tells is part of the outcome.
    #[must_use]
    pub fn with_root(mut self) -> Row {
        self.root = true;
        self
    }

    /// Where the guest stops at headers, no body comes to it: `allow_on_headers_stop_iteration` is off.
    #[must_use]
    pub fn strict(mut self) -> Row {
        self.strict = true;
        self
    }

    /// One plugin of its own with settings as in a policy file.
    #[must_use]
    pub fn with(self, settings: Value) -> Row {
        self.plugin(Plugin::new("own").settings(settings))
    }

    /// Wait for a line of the guest's that contains this.
    #[must_use]
    pub fn until(mut self, line: &'static str) -> Row {
        self.until = Some(line);
        self
    }

    /// The VM ends, and with it what it would have told.
    #[must_use]
    pub fn dies(mut self) -> Row {
        self.dies = true;
        self
    }

    /// In how many pieces a body comes is of no account: it is large.
    #[must_use]
    pub fn coarse(mut self) -> Row {
        self.coarse = true;
        self
    }

    /// Nobody waits for its callouts, so that the upstream may see them or not.
    #[must_use]
    pub fn fire_and_forget(mut self) -> Row {
        self.fire_and_forget = true;
        self
    }

    /// It has hosts of its own: whether they start, and whether they live on, is part of the outcome.
    #[must_use]
    pub fn alone(mut self) -> Row {
        self.alone = true;
        self
    }

    /// What the upstream got is part of the outcome.
    #[must_use]
    pub fn upstream(mut self) -> Row {
        self.upstream = true;
        self
    }

    /// The value of this metric is part of the outcome.
    #[must_use]
    pub fn metric(mut self, name: &'static str) -> Row {
        self.metrics.push(name);
        self
    }

    /// The outcomes differ, for the reason that `docs/abi.md` gives under this name.
    #[must_use]
    pub fn deviates(mut self, name: &'static str) -> Row {
        self.deviation = Some(name);
        self
    }

    /// The part of the id before the slash.
    pub fn area(&self) -> &str {
        self.id.split_once('/').map_or(self.id.as_str(), |(area, _)| area)
    }

    /// The id as part of a path.
    pub fn slug(&self) -> String {
        self.id.replace(['/', '_'], "-")
    }
}

impl Plugin {
    /// The guest `calls` without a configuration.
    pub fn new(name: &'static str) -> Plugin {
        Plugin { name, module: Module::Guest("calls"), configuration: String::new(), settings: json!({}) }
    }

    /// Another guest.
    #[must_use]
    pub fn guest(mut self, name: &'static str) -> Plugin {
        self.module = Module::Guest(name);
        self
    }

    /// The gate in another language.
    #[must_use]
    pub fn prebuilt(mut self, language: &'static str) -> Plugin {
        self.module = Module::Prebuilt(language);
        self
    }

    /// A module in WebAssembly's text format.
    #[must_use]
    pub fn text(mut self, text: impl Into<String>) -> Plugin {
        self.module = Module::Text(text.into());
        self
    }

    /// Its plugin configuration: for the guest `calls`, a script.
    #[must_use]
    pub fn configuration(mut self, configuration: &str) -> Plugin {
        self.configuration = configuration.to_owned();
        self
    }

    /// Settings as in a policy file.
    #[must_use]
    pub fn settings(mut self, settings: Value) -> Plugin {
        self.settings = settings;
        self
    }
}
