//! The shim's program: found, checked, and packed once.

use std::{fs, path::PathBuf};

use bytes::Bytes;

use crate::{config::DindConfig, error::OpenError};

/// Larger is no agent.
const MAX_BYTES: u64 = 256 * 1024 * 1024;

/// The static agent that goes into every container.
#[derive(Debug, Clone)]
pub(crate) struct Agent {
    pub(crate) bytes: Bytes,
    /// The processor that it runs on, as the engine calls it: `x86_64`, `aarch64`.
    pub(crate) architecture: &'static str,
}

impl Agent {
    /// Reads the configured agent, else the one beside the service's own program.
    ///
    /// # Errors
    /// Where there is none, or where it needs a dynamic loader, which no container can be relied on to have.
    pub(crate) fn load(config: &DindConfig) -> Result<Self, OpenError> {
        let path = find(config)?;
        let fail = |why: String| OpenError::Agent { path: path.display().to_string(), why };
        let metadata = fs::metadata(&path).map_err(|error| fail(error.to_string()))?;
        if metadata.len() > MAX_BYTES {
            return Err(fail("is too large".to_owned()));
        }
        let bytes = fs::read(&path).map_err(|error| fail(error.to_string()))?;
        let architecture = check(&bytes).map_err(|why| fail(why.to_owned()))?;
        Ok(Self { bytes: bytes.into(), architecture })
    }
}

fn find(config: &DindConfig) -> Result<PathBuf, OpenError> {
    if let Some(path) = &config.agent {
        return Ok(path.clone());
    }
    let own = std::env::current_exe()
        .map_err(|error| OpenError::Agent { path: "runner-agent".to_owned(), why: error.to_string() })?;
    let named = own.with_file_name("runner-agent-static");
    Ok(if named.is_file() { named } else { own.with_file_name("runner-agent") })
}

/// Checks that it is a 64-bit little-endian Linux program that needs no loader.
fn check(elf: &[u8]) -> Result<&'static str, &'static str> {
    const PT_INTERP: u32 = 3;
    let half = |at: usize| elf.get(at..at + 2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let word = |at: usize| elf.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return Err("is no program for 64-bit Linux");
    }
    let architecture = match half(18) {
        Some(62) => "x86_64",
        Some(183) => "aarch64",
        _ => return Err("is for a processor that is not known here"),
    };
    let table = elf.get(32..40).map(|b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
    let (Some(table), Some(size), Some(count)) = (table, half(54), half(56)) else {
        return Err("is cut off");
    };
    let table = usize::try_from(table).map_err(|_| "is malformed")?;
    for number in 0..usize::from(count) {
        let at = number.checked_mul(usize::from(size)).and_then(|offset| table.checked_add(offset));
        match at.and_then(word) {
            Some(PT_INTERP) => return Err("is linked dynamically; a container may have no loader for it"),
            Some(_) => {}
            None => return Err("is cut off"),
        }
    }
    Ok(architecture)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(machine: u16, kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56 * kinds.len()];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&u16::try_from(kinds.len()).unwrap().to_le_bytes());
        for (number, kind) in kinds.iter().enumerate() {
            bytes[64 + 56 * number..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn only_a_static_program_of_a_known_processor_will_do() {
        assert_eq!(check(&elf(62, &[1, 1, 2])), Ok("x86_64"));
        assert_eq!(check(&elf(183, &[1])), Ok("aarch64"));
        assert!(check(&elf(62, &[1, 3])).is_err_and(|why| why.contains("dynamically")));
        assert!(check(&elf(40, &[1])).is_err());
        assert!(check(b"#!/bin/sh").is_err());
        assert!(check(&elf(62, &[1, 1])[..100]).is_err());
    }

    #[test]
    fn a_missing_agent_is_an_error_that_says_what_to_do() {
        let config = DindConfig { agent: Some("/nowhere/runner-agent".into()), ..DindConfig::default() };
        let text = Agent::load(&config).unwrap_err().to_string();
        assert!(text.contains("/nowhere/runner-agent") && text.contains("cargo xtask agent"), "{text}");
    }
}
