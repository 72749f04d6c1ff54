//! Filters: modules and configurations are read here, so that what was checked is what runs.
//!
//! Only a module's first bytes are looked at. Whether it is valid WebAssembly with the ABI, and whether it accepts
//! its configuration, shows when a host loads it.

use std::collections::BTreeSet;

use super::names::is_token;
use super::{Compiler, References, owned, present};
use crate::capabilities::{FOREIGN_FUNCTIONS, HOST_FUNCTIONS};
use crate::file;
use crate::mistake::{Mistake, Position, did_you_mean};
use crate::policy::{Bytes, Filter, NamePattern};
use crate::units::{Size, Time};

const CONFIGURATION_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl Compiler<'_> {
    pub(super) fn filters(&mut self, written: Vec<Option<file::Filter>>, references: &References) -> Vec<Filter> {
        self.unique_names("filters", present(&written).map(|(index, filter)| (index, filter.name.as_str())));
        let mut filters = Vec::new();
        for (index, filter) in owned(written) {
            filters.push(self.filter(&format!("filters[{index}]"), filter, references));
        }
        filters
    }

    fn filter(&mut self, path: &str, filter: file::Filter, references: &References) -> Filter {
        let at = |field: &str| format!("{path}.{field}");
        if filter.protocol == file::Protocol::Tcp {
            self.tcp_filter(path);
        }
        self.filter_limits(&at("limits"), &filter.limits);
        let module = self.read(&at("wasm"), &filter.wasm, filter.limits.module_bytes.0);
        if let Some((_, bytes)) = &module {
            self.wasm_header(&at("wasm"), &filter.wasm, bytes);
        }
        let (module_path, module) = module.unwrap_or_default();
        let configuration = match (&filter.configuration, &filter.configuration_file) {
            (Some(_), Some(_)) => {
                self.wrong(
                    &at("configuration_file"),
                    "there is both `configuration` and `configuration_file`",
                    "keep one of the two",
                );
                Vec::new()
            }
            (Some(value), None) => self.configuration(&at("configuration"), value),
            (None, Some(file)) => self.configuration_file(&at("configuration_file"), file),
            (None, None) => Vec::new(),
        };
        let vm_configuration = match &filter.vm_configuration {
            Some(value) => self.configuration(&at("vm_configuration"), value),
            None => Vec::new(),
        };
        self.environment(&at("environment"), &filter.environment);
        let reload_base_interval =
            self.time(&at("reload.base_interval"), filter.reload.base_interval, Time::secs(3600));
        let reload_max_interval = self.time(&at("reload.max_interval"), filter.reload.max_interval, Time::secs(86_400));
        if filter.reload.max_interval < filter.reload.base_interval {
            self.wrong(
                &at("reload.max_interval"),
                format!("`{}` is less than `base_interval`", filter.reload.max_interval),
                format!("use at least `{}`", filter.reload.base_interval),
            );
        }
        let capabilities =
            filter.capabilities.map(|capabilities| self.capabilities(&at("capabilities"), &capabilities));
        let mut allowed_upstreams = BTreeSet::new();
        for (index, name) in filter.allowed_upstreams.iter().enumerate() {
            let path = format!("{path}.allowed_upstreams[{index}]");
            if let Some(upstream) = self.find(&path, name, &references.upstreams) {
                self.carries_requests(&path, upstream, references);
                allowed_upstreams.insert(upstream);
            }
        }
        let settable_fields = filter.settable_fields.map(|fields| {
            let each = fields.iter().enumerate();
            each.filter_map(|(index, field)| self.field_pattern(&format!("{path}.settable_fields[{index}]"), field))
                .collect()
        });
        let settable_properties = filter.settable_properties.map(|names| {
            let each = names.iter().enumerate();
            each.filter_map(|(index, name)| {
                self.property_pattern(&format!("{path}.settable_properties[{index}]"), name)
            })
            .collect()
        });
        let foreign_functions =
            filter.foreign_functions.map(|names| self.foreign_functions(&at("foreign_functions"), &names));
        Filter {
            name: filter.name,
            protocol: filter.protocol,
            module_path,
            module: Bytes::new(module),
            configuration: Bytes::new(configuration),
            root_id: filter.root_id,
            vm_id: filter.vm_id,
            vm_configuration: Bytes::new(vm_configuration),
            environment_pass: filter.environment.pass,
            environment_set: filter.environment.set.into_iter().collect(),
            failure_policy: filter.failure_policy,
            reload_base_interval,
            reload_max_interval,
            allow_on_headers_stop_iteration: filter.allow_on_headers_stop_iteration,
            capabilities,
            allowed_upstreams: allowed_upstreams.into_iter().collect(),
            settable_fields,
            settable_properties,
            foreign_functions,
            limits: filter.limits,
        }
    }

    fn filter_limits(&mut self, path: &str, limits: &file::FilterLimits) {
        let at = |field: &str| format!("{path}.{field}");
        let gib = Size::mib(1024);
        self.size(&at("memory"), limits.memory, Size::mib(1), Size::mib(4096));
        self.time(&at("callback_time"), limits.callback_time, Time::secs(10));
        self.time(&at("start_time"), limits.start_time, Time::secs(60));
        self.size(&at("callout_bytes"), limits.callout_bytes, Size(0), gib);
        self.size(&at("log_line_bytes"), limits.log_line_bytes, Size(80), Size::mib(1));
        self.size(&at("queue_bytes"), limits.queue_bytes, Size(0), gib);
        self.size(&at("buffered_bytes"), limits.buffered_bytes, Size::kib(1), gib);
        self.size(&at("shared_data_bytes"), limits.shared_data_bytes, Size(0), gib);
        self.size(&at("map_bytes"), limits.map_bytes, Size::kib(1), Size::mib(64));
        self.count(&at("map_pairs"), limits.map_pairs, 1, 100_000);
        self.size(&at("module_bytes"), limits.module_bytes, Size::kib(1), gib);
        self.time(&at("compile_time"), limits.compile_time, Time::secs(3600));
        self.size(&at("compile_memory"), limits.compile_memory, Size::mib(64), Size::mib(64 * 1024));
    }

    fn wasm_header(&mut self, path: &str, written: &str, bytes: &[u8]) {
        if bytes.starts_with(b"\0asm\x01\0\0\0") {
            return;
        }
        if bytes.starts_with(b"\0asm\x0d\0\x01\0") {
            self.wrong(
                path,
                format!("`{written}` is a WebAssembly component; filters are core modules"),
                "build for the target `wasm32-wasip1`",
            );
        } else {
            self.wrong(
                path,
                format!("`{written}` is not a WebAssembly module"),
                "name the `.wasm` file that the build made; it starts with the bytes `\\0asm`",
            );
        }
    }

    fn configuration(&mut self, path: &str, value: &serde_json::Value) -> Vec<u8> {
        match value {
            serde_json::Value::Null => {
                self.wrong(path, "expected a configuration, found nothing", "write `{}`, or remove the key");
                Vec::new()
            }
            serde_json::Value::String(text) => text.clone().into_bytes(),
            value => value.to_string().into_bytes(),
        }
    }

    fn configuration_file(&mut self, path: &str, written: &str) -> Vec<u8> {
        let Some((resolved, bytes)) = self.read(path, written, CONFIGURATION_BYTES_MAX) else {
            return Vec::new();
        };
        let is_json = resolved.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        if is_json && let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes) {
            let problem = error.to_string();
            let problem = problem.split(" at line ").next().unwrap_or(&problem);
            // The line is not shown: configurations may hold key material.
            self.mistakes.push(Mistake {
                file: written.to_owned(),
                position: Some(Position { line: error.line(), column: error.column().max(1), width: 1 }),
                source_line: None,
                path: path.to_owned(),
                problem: format!("this is not valid JSON: {problem}"),
                hint: Some("look at commas and quotes here and just before".to_owned()),
            });
        }
        bytes
    }

    fn environment(&mut self, path: &str, environment: &file::Environment) {
        let names = environment.pass.iter().enumerate().map(|(index, name)| (format!("{path}.pass[{index}]"), name));
        let names = names.chain(environment.set.keys().map(|name| (format!("{path}.set.{name}"), name)));
        let mut seen = BTreeSet::new();
        for (path, name) in names {
            if name.is_empty() || name.contains(['=', '\0']) {
                self.wrong(
                    &path,
                    format!("`{}` cannot be a variable's name", name.escape_debug()),
                    "write e.g. `REGION`",
                );
            }
            if !seen.insert(name) {
                self.wrong(&path, format!("the variable `{name}` is given twice"), "keep one of the two");
            }
        }
        for (name, value) in &environment.set {
            if value.contains('\0') {
                self.wrong(&format!("{path}.set.{name}"), "a variable's value cannot hold NUL", "remove the NUL");
            }
        }
    }

    fn capabilities(&mut self, path: &str, written: &[String]) -> Vec<String> {
        let mut capabilities = BTreeSet::new();
        for (index, name) in written.iter().enumerate() {
            let path = format!("{path}[{index}]");
            if HOST_FUNCTIONS.contains(&name.as_str()) {
                capabilities.insert(name.clone());
            } else if name.starts_with("proxy_on_") {
                self.wrong(
                    &path,
                    format!("`{name}` is a callback, and callbacks are always delivered"),
                    "list host functions only",
                );
            } else {
                let hint = match did_you_mean(name, HOST_FUNCTIONS.iter().copied()) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => {
                        "use names of Proxy-Wasm 0.2.1 or WASI preview 1, e.g. `proxy_log` or `fd_write`".to_owned()
                    }
                };
                self.wrong(&path, format!("there is no host function `{name}`"), hint);
            }
        }
        capabilities.into_iter().collect()
    }

    fn foreign_functions(&mut self, path: &str, written: &[String]) -> Vec<String> {
        let mut functions = BTreeSet::new();
        for (index, name) in written.iter().enumerate() {
            if FOREIGN_FUNCTIONS.contains(&name.as_str()) {
                functions.insert(name.clone());
                continue;
            }
            let hint = match did_you_mean(name, FOREIGN_FUNCTIONS.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("there are {}", FOREIGN_FUNCTIONS.join(", ")),
            };
            self.wrong(&format!("{path}[{index}]"), format!("there is no foreign function `{name}`"), hint);
        }
        functions.into_iter().collect()
    }

    fn property_pattern(&mut self, path: &str, written: &str) -> Option<NamePattern> {
        let (name, is_prefix) = match written.strip_suffix('*') {
            Some(prefix) => (prefix, true),
            None => (written, false),
        };
        if name.contains(['*', '\0']) || (name.is_empty() && !is_prefix) {
            self.wrong(
                path,
                format!("`{}` is not a property's name", written.escape_debug()),
                "write e.g. `rate.left` or `\"rate.*\"`, without the `wasm.` below `filter_state`",
            );
            return None;
        }
        Some(if is_prefix { NamePattern::Prefix(name.to_owned()) } else { NamePattern::Exact(name.to_owned()) })
    }

    fn field_pattern(&mut self, path: &str, written: &str) -> Option<NamePattern> {
        let lower = written.to_ascii_lowercase();
        if let Some(prefix) = lower.strip_suffix('*')
            && (prefix.is_empty() || is_token(prefix))
        {
            return Some(NamePattern::Prefix(prefix.to_owned()));
        }
        // Pseudo-fields are how a filter changes method, path, authority and status.
        if is_token(lower.strip_prefix(':').unwrap_or(&lower)) {
            return Some(NamePattern::Exact(lower));
        }
        self.wrong(
            path,
            format!("`{written}` is not a field name"),
            "write e.g. `authorization` or `\"x-portcullis-*\"`",
        );
        None
    }
}
