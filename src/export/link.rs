//! Links to files: 128 bits that nobody guesses, known only to the recipient of the mail.
//!
//! The same mail carries the same link at each attempt, so that a repeat is the same message byte for
//! byte; and no table holds it. Hence it is derived, from the mail's `Message-ID` and a key that lies
//! beside the database and not in it. The database keeps the hash, which leads back to nothing.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// Bytes of a link.
const LENGTH: usize = 16;

/// What links are derived from. If it is lost, the links that are out stay good and later ones differ.
#[derive(Clone)]
pub struct LinkKey([u8; 32]);

impl LinkKey {
    /// A key that only this installation knows.
    #[must_use]
    pub fn new(key: [u8; 32]) -> Self {
        Self(key)
    }

    /// The link in the mail with this `Message-ID`.
    pub(super) fn link(&self, message_id: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes any key");
        mac.update(b"link to the file of an export\n");
        mac.update(message_id.as_bytes());
        URL_SAFE_NO_PAD.encode(&mac.finalize().into_bytes()[..LENGTH])
    }
}

impl std::fmt::Debug for LinkKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LinkKey(***)")
    }
}

/// The hash under which the database knows a link. `None`: it is no link at all.
#[must_use]
pub fn link_hash(link: &str) -> Option<String> {
    let bytes = URL_SAFE_NO_PAD.decode(link).ok()?;
    if bytes.len() != LENGTH {
        return None;
    }
    let hash = Sha256::digest(bytes);
    Some(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mail_has_the_same_link_each_time_and_no_other_mail_or_key_has_it() {
        let key = LinkKey::new([7; 32]);
        let link = key.link("a.1@timelined");
        assert_eq!(link, key.link("a.1@timelined"));
        assert_ne!(link, key.link("a.2@timelined"));
        assert_ne!(link, LinkKey::new([8; 32]).link("a.1@timelined"));
        assert_eq!(link.len(), 22);
        assert_eq!(link_hash(&link).unwrap().len(), 64);
        assert_eq!(format!("{key:?}"), "LinkKey(***)");
    }

    #[test]
    fn what_is_no_link_has_no_hash() {
        for text in [
            "",
            "a",
            "AAAAAAAAAAAAAAAAAAAAAAA",
            "../../../etc/passwd",
            "AAAAAAAAAAAAAAAAAAAAA=",
        ] {
            assert_eq!(link_hash(text), None, "{text}");
        }
    }
}
