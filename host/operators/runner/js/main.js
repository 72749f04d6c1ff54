// Evaluated once, when the snapshot is made. The process takes these functions and removes the name.
globalThis.__portcullis = __bootstrap.core.loadExtScript("ext:portcullis/serve.js");
