// Stands in for a script that `deno_fetch` refers to: there is no HTTP client of an operator's own, so nothing is one.
(function () {
return { HttpClientPrototype: { __proto__: null } };
})();
