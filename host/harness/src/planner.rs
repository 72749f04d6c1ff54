//! From what a scenario file says to what is done: tokens and times filled in, files read, everything in bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::content::{Content, Line, is_token};
use crate::document::{
    CalloutDocument, CalloutsExpectDocument, Document, ExpectDocument, FailureDocument, FieldExpectDocument,
    GrpcDocument, RepliesDocument, RequestDocument, RequestExpectDocument, ResponseDocument, ResponseExpectDocument,
    StepDocument, UpstreamExpectDocument,
};
use crate::expectation::{
    CalloutsExpectation, Expectation, FieldExpectation, Origin, RequestExpectation, ResponseExpectation,
    UpstreamExpectation,
};
use crate::grpc::{GrpcPlan, Replies};
use crate::message::FieldLines;
use crate::plan::{Callout, CalloutAnswer, RequestPlan, ResponsePlan};
use crate::scenario::Step;
use crate::template::{Values, expand};
use crate::yaml::{FileError, nearest};

pub(crate) struct Planner<'a> {
    pub(crate) file: &'a Path,
    pub(crate) values: Values,
}

impl Planner<'_> {
    fn fail(&self, path: &str, problem: impl Into<String>) -> FileError {
        FileError::at(self.file, path, problem)
    }

    /// All steps; a scenario without `steps` is one.
    pub(crate) fn steps(&self, document: &Document) -> Result<Vec<Step>, FileError> {
        match (&document.steps, &document.request) {
            (None, Some(request)) => {
                let step = Step {
                    callouts: self.callouts("callouts", &document.callouts)?,
                    upstream_response: self.response("upstream_response", document.upstream_response.as_ref())?,
                    expect: self.expect("expect", document.expect.as_ref())?,
                    ..self.request_step("request", request)?
                };
                Ok(vec![step])
            }
            (Some(steps), None) if document.upstream_response.is_none() && document.expect.is_none() => {
                if steps.is_empty() {
                    return Err(self.fail("steps", "the list is empty"));
                }
                let mut planned = Vec::new();
                for (index, step) in steps.iter().enumerate() {
                    let mut step = self.step(&format!("steps[{index}]"), step)?;
                    if index == 0 {
                        let mut callouts = self.callouts("callouts", &document.callouts)?;
                        callouts.extend(std::mem::take(&mut step.callouts));
                        step.callouts = callouts;
                    }
                    planned.push(step);
                }
                Ok(planned)
            }
            (Some(_), _) => Err(self
                .fail("steps", "there is a request outside the steps as well")
                .hint("move `request`, `upstream_response` and `expect` into a step")),
            (None, None) => Err(self.fail("", "`request` is missing").hint("give `request` and `expect`, or `steps`")),
        }
    }

    fn step(&self, path: &str, step: &StepDocument) -> Result<Step, FileError> {
        let at = |name: &str| format!("{path}.{name}");
        let base = match &step.request {
            Some(request) => self.request_step(&at("request"), request)?,
            None if step.upstream_response.is_some() => {
                return Err(self
                    .fail(&at("upstream_response"), "there is no request to answer")
                    .hint("add `request`, or leave it out"));
            }
            None => Step::default(),
        };
        let mut enqueue = Vec::new();
        for (queue, items) in &step.enqueue {
            for (index, item) in items.iter().enumerate() {
                enqueue.push((queue.clone(), self.content(&format!("{path}.enqueue.{queue}[{index}]"), item)?));
            }
        }
        let planned = Step {
            name: step.name.clone(),
            callouts: self.callouts(&at("callouts"), &step.callouts)?,
            advance: self.duration(&at("advance"), step.advance.as_deref())?,
            ticks: step.ticks.unwrap_or_default(),
            enqueue,
            worker: step.worker.unwrap_or_default(),
            upstream_response: self.response(&at("upstream_response"), step.upstream_response.as_ref())?,
            expect: self.expect(&at("expect"), step.expect.as_ref())?,
            ..base
        };
        if planned.request.is_none() {
            let moves = !planned.advance.is_zero() || planned.ticks > 0 || !planned.enqueue.is_empty();
            if !moves {
                return Err(self
                    .fail(path, "nothing happens in this step")
                    .hint("give it a `request`, or `advance`, `ticks` or `enqueue`"));
            }
            if planned.expect.concerns_messages() {
                return Err(
                    self.fail(&at("expect"), "without a request there is no response, and nothing goes upstream")
                );
            }
        }
        Ok(planned)
    }

    fn request_step(&self, path: &str, request: &RequestDocument) -> Result<Step, FileError> {
        let mut properties = Vec::new();
        for (name, value) in &request.properties {
            properties.push((name.clone(), self.content(&format!("{path}.properties.{name}"), value)?));
        }
        if request.every_split && request.body.is_none() {
            return Err(self.fail(&format!("{path}.every_split"), "there is no `body` to split").hint("add `body`"));
        }
        Ok(Step {
            request: Some(self.request(path, request)?),
            every_split: request.every_split,
            properties,
            ..Step::default()
        })
    }

    fn text(&self, path: &str, text: &str) -> Result<String, FileError> {
        expand(text, &self.values).map_err(|(problem, hint)| self.fail(path, problem).hint(hint))
    }

    pub(crate) fn content(&self, path: &str, content: &Content) -> Result<Vec<u8>, FileError> {
        content.resolve(&self.values, self.file, path)
    }

    fn contents(&self, path: &str, contents: &[Content]) -> Result<Vec<Vec<u8>>, FileError> {
        let resolved = contents.iter().enumerate().map(|(at, content)| self.content(&format!("{path}[{at}]"), content));
        resolved.collect()
    }

    fn lines(&self, path: &str, lines: &[Line]) -> Result<FieldLines, FileError> {
        let mut fields = FieldLines::new();
        for (index, line) in lines.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let value = line.value.resolve(&self.values, self.file, &path)?;
            if value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
                return Err(self.fail(&path, "a field value cannot hold a line break or a zero byte"));
            }
            fields.push(&line.name, value);
        }
        Ok(fields)
    }

    fn body(
        &self,
        path: &str,
        whole: Option<&Content>,
        chunks: Option<&Vec<Content>>,
    ) -> Result<Option<Vec<Vec<u8>>>, FileError> {
        match (whole, chunks) {
            (Some(_), Some(_)) => {
                Err(self.fail(path, "both `body` and `body_chunks` are given").hint("keep one of them"))
            }
            (Some(body), None) => {
                let body = body.resolve(&self.values, self.file, &format!("{path}.body"))?;
                Ok(Some(if body.is_empty() { Vec::new() } else { vec![body] }))
            }
            (None, Some(chunks)) => {
                let mut body = Vec::new();
                for (index, chunk) in chunks.iter().enumerate() {
                    let path = format!("{path}.body_chunks[{index}]");
                    let chunk = chunk.resolve(&self.values, self.file, &path)?;
                    if chunk.is_empty() {
                        return Err(self.fail(&path, "a chunk cannot be empty").hint("an empty chunk ends a body"));
                    }
                    body.push(chunk);
                }
                Ok(Some(body))
            }
            (None, None) => Ok(None),
        }
    }

    fn request(&self, path: &str, request: &RequestDocument) -> Result<RequestPlan, FileError> {
        let at = |name: &str| format!("{path}.{name}");
        let method = self.text(&at("method"), &request.method)?;
        if !is_token(&method) {
            return Err(self.fail(&at("method"), format!("`{method}` is not a method")));
        }
        let target = self.text(&at("path"), &request.path)?;
        if target.is_empty() || target.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            return Err(self
                .fail(&at("path"), "a request target cannot be empty or hold white space")
                .hint("escape it, e.g. `%20`"));
        }
        let body = self.body(path, request.body.as_ref(), request.body_chunks.as_ref())?.unwrap_or_default();
        let trailers = self.lines(&at("trailers"), &request.trailers)?;
        if !trailers.is_empty() && body.is_empty() {
            return Err(self.fail(&at("trailers"), "trailers follow a body, and there is none"));
        }
        Ok(RequestPlan {
            method,
            path: target,
            authority: self.text(&at("authority"), &request.authority)?,
            fields: self.lines(&at("fields"), &request.fields)?,
            body,
            trailers,
        })
    }

    fn response(&self, path: &str, response: Option<&ResponseDocument>) -> Result<ResponsePlan, FileError> {
        let Some(response) = response else {
            return Ok(ResponsePlan::default());
        };
        if !(200..=599).contains(&response.status) {
            return Err(self.fail(&format!("{path}.status"), format!("{} is not a final status", response.status)));
        }
        let body = self.body(path, response.body.as_ref(), response.body_chunks.as_ref())?;
        let bodiless = matches!(response.status, 204 | 304);
        if bodiless && body.as_ref().is_some_and(|body| !body.is_empty()) {
            return Err(self.fail(path, format!("a {} response has no body", response.status)));
        }
        Ok(ResponsePlan {
            status: response.status,
            fields: self.lines(&format!("{path}.fields"), &response.fields)?,
            body: body.unwrap_or_else(|| if bodiless { Vec::new() } else { vec![b"ok".to_vec()] }),
            trailers: self.lines(&format!("{path}.trailers"), &response.trailers)?,
        })
    }

    fn callouts(
        &self,
        path: &str,
        callouts: &BTreeMap<String, Vec<CalloutDocument>>,
    ) -> Result<BTreeMap<String, Vec<Callout>>, FileError> {
        let mut planned = BTreeMap::new();
        for (upstream, answers) in callouts {
            let mut list = Vec::new();
            for (index, answer) in answers.iter().enumerate() {
                list.push(self.callout(&format!("{path}.{upstream}[{index}]"), answer)?);
            }
            planned.insert(upstream.clone(), list);
        }
        Ok(planned)
    }

    fn callout(&self, path: &str, callout: &CalloutDocument) -> Result<Callout, FileError> {
        let answer = match (&callout.response, &callout.grpc, callout.failure) {
            (Some(response), None, None) => {
                CalloutAnswer::Response(self.response(&format!("{path}.response"), Some(response))?)
            }
            (None, Some(grpc), None) => CalloutAnswer::Grpc(self.grpc(&format!("{path}.grpc"), grpc)?),
            (None, None, Some(FailureDocument::Refused)) => CalloutAnswer::Refused,
            (None, None, Some(FailureDocument::Timeout)) => CalloutAnswer::Timeout,
            (None, None, Some(FailureDocument::Reset)) => CalloutAnswer::Reset,
            _ => {
                return Err(self
                    .fail(path, "an answer is one of `response`, `grpc` and `failure`")
                    .hint("failures are `refused`, `timeout` and `reset`"));
            }
        };
        Ok(Callout {
            path: callout.path.clone(),
            times: callout.times,
            delay: self.duration(&format!("{path}.delay"), callout.delay.as_deref())?,
            answer,
        })
    }

    fn grpc(&self, path: &str, grpc: &GrpcDocument) -> Result<GrpcPlan, FileError> {
        let message = self.text(&format!("{path}.message"), &grpc.message)?;
        if message.bytes().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
            let problem = "a status message cannot hold a line break or a zero byte";
            return Err(self.fail(&format!("{path}.message"), problem));
        }
        Ok(GrpcPlan {
            fields: self.lines(&format!("{path}.fields"), &grpc.fields)?,
            messages: self.contents(&format!("{path}.messages"), &grpc.messages)?,
            replies: match grpc.replies {
                RepliesDocument::AtOnce => Replies::AtOnce,
                RepliesDocument::PerMessage => Replies::PerMessage,
                RepliesDocument::AtEnd => Replies::AtEnd,
            },
            status: grpc.status,
            message,
            trailers: self.lines(&format!("{path}.trailers"), &grpc.trailers)?,
        })
    }

    fn duration(&self, path: &str, text: Option<&str>) -> Result<Duration, FileError> {
        let Some(text) = text else { return Ok(Duration::ZERO) };
        parse_duration(text).ok_or_else(|| {
            self.fail(path, format!("`{text}` is not a duration"))
                .hint("write a number and a unit: `300ms`, `5s`, `2m`, `1h`")
        })
    }

    /// What is not there expects nothing; only `portcullis test --update` gets so far with it.
    fn expect(&self, path: &str, expect: Option<&ExpectDocument>) -> Result<Expectation, FileError> {
        let Some(expect) = expect else { return Ok(Expectation::default()) };
        let at = |name: &str| format!("{path}.{name}");
        let (response, origin) = match (&expect.local_response, &expect.response) {
            (Some(_), Some(_)) => {
                return Err(self.fail(path, "both `local_response` and `response` are given").hint(
                    "`local_response` is for an answer made by the filter, `response` for one from the upstream",
                ));
            }
            (Some(local), None) => (Some(self.expect_response(&at("local_response"), local)?), Origin::Local),
            (None, Some(response)) => (Some(self.expect_response(&at("response"), response)?), Origin::Upstream),
            (None, None) => (None, Origin::Either),
        };
        if expect.closed && response.is_some() {
            return Err(self.fail(&at("closed"), "a connection closed without an answer has no response"));
        }
        let upstream = match &expect.upstream {
            Some(UpstreamExpectDocument::NotCalled) => Some(UpstreamExpectation::NotCalled),
            Some(UpstreamExpectDocument::Request(request)) => {
                Some(UpstreamExpectation::Request(Box::new(self.expect_request(&at("upstream"), request)?)))
            }
            None => None,
        };
        let mut callouts = BTreeMap::new();
        for (name, calls) in &expect.callouts {
            let calls = match calls {
                CalloutsExpectDocument::Count(count) => CalloutsExpectation::Count(*count),
                CalloutsExpectDocument::Requests(requests) => {
                    let requests = requests.iter().enumerate().map(|(index, request)| {
                        self.expect_request(&format!("{path}.callouts.{name}[{index}]"), request)
                    });
                    CalloutsExpectation::Requests(requests.collect::<Result<_, _>>()?)
                }
            };
            callouts.insert(name.clone(), calls);
        }
        let mut queues = BTreeMap::new();
        for (name, items) in &expect.queues {
            queues.insert(name.clone(), self.contents(&format!("{path}.queues.{name}"), items)?);
        }
        let expectation = Expectation {
            response,
            origin,
            closed: expect.closed,
            upstream,
            counters: expect.counters.clone(),
            callouts,
            log: expect.log.iter().map(|text| self.text(&at("log"), text)).collect::<Result<_, _>>()?,
            details: self.optional_text(&at("details"), expect.details.as_deref())?,
            properties: self.values_by_name(&at("properties"), &expect.properties)?,
            shared_data: self.values_by_name(&at("shared_data"), &expect.shared_data)?,
            queues,
        };
        if expectation.is_empty() {
            return Err(self
                .fail(path, "nothing is expected, so the scenario would always pass")
                .hint("add `local_response`, `response`, `upstream`, `closed`, `counters` or `callouts`"));
        }
        Ok(expectation)
    }

    fn values_by_name(
        &self,
        path: &str,
        values: &BTreeMap<String, Option<Content>>,
    ) -> Result<BTreeMap<String, Option<Vec<u8>>>, FileError> {
        let mut planned = BTreeMap::new();
        for (name, value) in values {
            let value = self.optional_content(&format!("{path}.{name}"), value.as_ref())?;
            planned.insert(name.clone(), value);
        }
        Ok(planned)
    }

    fn expect_request(&self, path: &str, request: &RequestExpectDocument) -> Result<RequestExpectation, FileError> {
        let at = |name: &str| format!("{path}.{name}");
        let messages = request.grpc_messages.as_ref();
        Ok(RequestExpectation {
            method: self.optional_text(&at("method"), request.method.as_deref())?,
            path: self.optional_text(&at("path"), request.path.as_deref())?,
            authority: self.optional_text(&at("authority"), request.authority.as_deref())?,
            fields: self.expect_fields(&at("fields"), &request.fields)?,
            absent_fields: self.names(&at("absent_fields"), &request.absent_fields)?,
            body: self.optional_content(&at("body"), request.body.as_ref())?,
            json: request.json.clone(),
            grpc_messages: messages.map(|messages| self.contents(&at("grpc_messages"), messages)).transpose()?,
            trailers: self.expect_fields(&at("trailers"), &request.trailers)?,
        })
    }

    fn expect_response(&self, path: &str, response: &ResponseExpectDocument) -> Result<ResponseExpectation, FileError> {
        Ok(ResponseExpectation {
            status: response.status,
            fields: self.expect_fields(&format!("{path}.fields"), &response.fields)?,
            absent_fields: self.names(&format!("{path}.absent_fields"), &response.absent_fields)?,
            body: self.optional_content(&format!("{path}.body"), response.body.as_ref())?,
            json: response.json.clone(),
            trailers: self.expect_fields(&format!("{path}.trailers"), &response.trailers)?,
        })
    }

    fn expect_fields(
        &self,
        path: &str,
        fields: &BTreeMap<String, FieldExpectDocument>,
    ) -> Result<BTreeMap<String, FieldExpectation>, FileError> {
        let mut planned = BTreeMap::new();
        for (name, field) in fields {
            let path = format!("{path}.{name}");
            self.name(&path, name)?;
            let expectation = match field {
                FieldExpectDocument::Lines(lines) => FieldExpectation::Lines(
                    lines
                        .iter()
                        .map(|line| line.resolve(&self.values, self.file, &path))
                        .collect::<Result<Vec<_>, _>>()?,
                ),
                FieldExpectDocument::Contains(text) => FieldExpectation::Contains(self.text(&path, text)?),
                FieldExpectDocument::StartsWith(text) => FieldExpectation::StartsWith(self.text(&path, text)?),
            };
            planned.insert(name.to_ascii_lowercase(), expectation);
        }
        Ok(planned)
    }

    fn names(&self, path: &str, names: &[String]) -> Result<Vec<String>, FileError> {
        for (index, name) in names.iter().enumerate() {
            self.name(&format!("{path}[{index}]"), name)?;
        }
        Ok(names.iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    fn name(&self, path: &str, name: &str) -> Result<(), FileError> {
        if is_token(name) {
            return Ok(());
        }
        let known = nearest(name.trim_start_matches(':'), ["method", "path", "authority", "status"]);
        let hint = known.map(|name| format!("use the key `{name}` beside `fields`")).unwrap_or_default();
        Err(self.fail(path, format!("`{name}` is not a field name")).hint(hint))
    }

    fn optional_text(&self, path: &str, text: Option<&str>) -> Result<Option<String>, FileError> {
        text.map(|text| self.text(path, text)).transpose()
    }

    fn optional_content(&self, path: &str, content: Option<&Content>) -> Result<Option<Vec<u8>>, FileError> {
        content.map(|content| content.resolve(&self.values, self.file, path)).transpose()
    }
}

/// `300ms`, `5s`, `2m` or `1h`.
fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at_checked(digits)?;
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_durations() {
        assert_eq!(parse_duration("300ms"), Some(Duration::from_millis(300)));
        assert_eq!(parse_duration("1h"), Some(Duration::from_secs(3600)));
        assert_eq!(parse_duration("5"), None);
        assert_eq!(parse_duration("s"), None);
        assert_eq!(parse_duration("99999999999999999999h"), None);
    }
}
