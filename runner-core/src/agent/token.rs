//! The tokens of agents.
//!
//! A token is `ATTEMPT.MAC`: the attempt's id and HMAC-SHA-256 over it, in hexadecimal, with a key that only the service
//! has. So it is for one attempt and nothing else; the service stores no token, not even a hash of one, and still knows
//! its own after a restart. That it dies with its attempt is the surface's to see to: it asks the state store.

use std::{fmt, str::FromStr as _};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::id::AttemptId;

/// 256 secret bits that every token is made with. Has no `Display`; its `Debug` tells nothing.
#[derive(Clone)]
pub struct AgentKey([u8; 32]);

impl fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentKey")
    }
}

impl AgentKey {
    /// A key of these bits.
    pub const fn new(bits: [u8; 32]) -> Self {
        Self(bits)
    }

    fn mac(&self, attempt: AttemptId) -> Hmac<Sha256> {
        #[allow(clippy::expect_used, reason = "HMAC takes a key of any length")]
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes a key of any length");
        mac.update(format!("runner-agent-v1\n{attempt}").as_bytes());
        mac
    }

    pub(super) fn token(&self, attempt: AttemptId) -> String {
        format!("{attempt}.{}", hex::encode(self.mac(attempt).finalize().into_bytes()))
    }

    /// Takes the same time wherever a token differs.
    pub(super) fn verify(&self, token: &str) -> Option<AttemptId> {
        let (attempt, mac) = token.rsplit_once('.')?;
        let attempt = AttemptId::from_str(attempt).ok()?;
        let mac = hex::decode(mac).ok()?;
        self.mac(attempt).verify_slice(&mac).ok().map(|()| attempt)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::id::RunId;

    fn attempt(run: u128, number: u32) -> AttemptId {
        AttemptId { run: RunId::new(Uuid::from_u128(run)), number }
    }

    #[test]
    fn a_token_is_for_one_attempt_of_one_service() {
        let (ours, theirs) = (AgentKey::new([1; 32]), AgentKey::new([2; 32]));
        let token = ours.token(attempt(7, 1));
        assert_eq!(ours.verify(&token), Some(attempt(7, 1)));
        assert_eq!(theirs.verify(&token), None);
        // The same proof under another name.
        let (_, mac) = token.rsplit_once('.').unwrap();
        assert_eq!(ours.verify(&format!("{}.{mac}", attempt(7, 2))), None);
        assert_eq!(ours.verify(&format!("{}.{mac}", attempt(8, 1))), None);
    }

    #[test]
    fn what_is_no_token_is_nobodys() {
        let key = AgentKey::new([1; 32]);
        let token = key.token(attempt(7, 1));
        for bad in [
            "",
            ".",
            "x",
            &token[1..],
            &token[..token.len() - 1],
            &format!("{token}0"),
            &token.replace('.', "-"),
        ] {
            assert_eq!(key.verify(bad), None, "{bad}");
        }
        assert!(!format!("{key:?}").contains('1'));
    }
}
