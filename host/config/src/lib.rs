//! portcullis.yaml: the model, its errors, and the Envoy bootstrap it renders to.
