"""minidit's models inside of other libraries' pipelines: one module a library, which imports it."""
