//! Stand-ins for the host, for the tests of filters.

use std::cell::Cell;
use std::collections::BTreeMap;

use crate::host::{ForeignCallError, Host};

type Function = Box<dyn Fn(&[u8]) -> Result<Vec<u8>, ForeignCallError>>;

/// A host that knows what a test told it and nothing else.
#[derive(Default)]
pub struct TestHost {
    properties: BTreeMap<Vec<String>, Vec<u8>>,
    functions: BTreeMap<String, Function>,
    calls: Cell<usize>,
}

impl TestHost {
    /// The host, now knowing this property.
    #[must_use]
    pub fn with_property(mut self, path: &[&str], value: &[u8]) -> Self {
        self.properties.insert(path.iter().map(|part| (*part).to_owned()).collect(), value.to_owned());
        self
    }

    /// The host, now having this function.
    #[must_use]
    pub fn with_function(
        mut self,
        name: &str,
        function: impl Fn(&[u8]) -> Result<Vec<u8>, ForeignCallError> + 'static,
    ) -> Self {
        self.functions.insert(name.to_owned(), Box::new(function));
        self
    }

    /// How many foreign functions were called so far, those that are absent included.
    pub fn foreign_calls(&self) -> usize {
        self.calls.get()
    }
}

impl Host for TestHost {
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        let path: Vec<String> = path.iter().map(|part| (*part).to_owned()).collect();
        self.properties.get(&path).cloned()
    }

    fn call_foreign_function(&self, name: &str, argument: &[u8]) -> Result<Vec<u8>, ForeignCallError> {
        self.calls.set(self.calls.get() + 1);
        self.functions.get(name).map_or(Err(ForeignCallError::Absent), |function| function(argument))
    }
}
