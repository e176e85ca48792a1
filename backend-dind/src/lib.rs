//! The Docker backend: attempts as containers of a Docker Engine.
