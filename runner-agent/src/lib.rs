//! runner-agent
