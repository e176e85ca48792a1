//! The shim against real processes, namespaces and control groups. What the machine does not allow is skipped, and said.

mod confinement;
mod ending;
mod harness;
mod interaction;
mod output;
