//! `[auth]`: how tokens are checked: a shared key *or* a public key, never both.

use std::net::SocketAddr;

use jsonwebtoken::DecodingKey;

use super::error::Problem;
use super::reader::Section;
use super::rules::{choice, words};
use super::secret::Secret;

/// HMAC keys shorter than the hash weaken it, RFC 7518 section 3.2.
const SHORTEST_HS256_KEY: usize = 32;

/// `[auth]`: how tokens are checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// The algorithm and its key.
    pub verifier: Verifier,
    /// The `iss` that tokens must have, when set.
    pub issuer: Option<String>,
}

/// An algorithm with the kind of key that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verifier {
    /// HS256; without a key, which only `SQLite` allows, the daemon makes one at its first start.
    Hs256(Option<Secret>),
    /// One of the algorithms with a public key.
    PublicKey {
        /// Which one.
        algorithm: PublicKeyAlgorithm,
        /// The key in PEM; it has been checked to be one of the algorithm.
        pem: String,
    },
}

/// The algorithms that need only a public key here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublicKeyAlgorithm {
    /// Ed25519.
    EdDsa,
    /// RSA with SHA-256.
    Rs256,
    /// P-256 with SHA-256.
    Es256,
}

/// What `[auth]` has to know of the other sections.
pub(super) struct Surroundings {
    pub(super) on_postgres: bool,
    pub(super) listen: SocketAddr,
}

impl Auth {
    pub(super) fn read(section: &mut Section<'_>, surroundings: &Surroundings) -> Self {
        let algorithm = section.take(
            "algorithm",
            "HS256",
            &choice(&[
                ("HS256", Algorithm::Hs256),
                ("EdDSA", Algorithm::PublicKey(PublicKeyAlgorithm::EdDsa)),
                ("RS256", Algorithm::PublicKey(PublicKeyAlgorithm::Rs256)),
                ("ES256", Algorithm::PublicKey(PublicKeyAlgorithm::Es256)),
            ]),
        );
        let hs256_key = section.secret("hs256_key");
        let public_key = section.secret("public_key");
        let verifier = match algorithm {
            Algorithm::Hs256 => Self::read_hs256(section, hs256_key, surroundings),
            Algorithm::PublicKey(algorithm) => {
                Self::read_public_key(section, algorithm, public_key)
            }
        };
        Self {
            verifier,
            issuer: section
                .take_optional("issuer", &words("the iss of the tokens, as text in quotes")),
        }
    }

    fn read_hs256(
        section: &mut Section<'_>,
        key: Option<Secret>,
        surroundings: &Surroundings,
    ) -> Verifier {
        const KEY: &str = "hs256_key";
        if section.is_given("public_key") {
            let problem = Problem::new("is of no use to HS256");
            section.fail(
                "public_key",
                problem.allowed(
                    "set auth.algorithm to \"EdDSA\", \"RS256\" or \"ES256\", or leave it out",
                ),
            );
        }
        let listen = surroundings.listen;
        if let Some(key) = &key {
            let length = key.expose_secret().len();
            if length < SHORTEST_HS256_KEY {
                let problem = Problem::new(format!("is {length} bytes long"));
                section.fail(
                    KEY,
                    problem.allowed(format!("at least {SHORTEST_HS256_KEY} bytes")),
                );
            }
        } else if section.is_given(KEY) {
            // It was refused for itself; that it is missing would be a second error about the same.
        } else if surroundings.on_postgres {
            let problem =
                Problem::new("is missing; daemons that share a PostgreSQL must share a key");
            section.fail_because_of(
                "database.url",
                KEY,
                problem.allowed(format!("at least {SHORTEST_HS256_KEY} bytes")),
            );
        } else if !listen.ip().is_loopback() {
            let problem = Problem::new(format!(
                "is missing, while {listen} can be reached from outside"
            ));
            section.fail_because_of(
                "http.listen",
                KEY,
                problem.allowed(format!(
                    "set a key of at least {SHORTEST_HS256_KEY} bytes, or listen on 127.0.0.1"
                )),
            );
        }
        Verifier::Hs256(key)
    }

    fn read_public_key(
        section: &mut Section<'_>,
        algorithm: PublicKeyAlgorithm,
        key: Option<Secret>,
    ) -> Verifier {
        const KEY: &str = "public_key";
        let name = algorithm.name();
        if section.is_given("hs256_key") {
            let problem = Problem::new(format!("is of no use to {name}"));
            section.fail(
                "hs256_key",
                problem.allowed("set auth.algorithm to \"HS256\", or leave it out"),
            );
        }
        let pem = key
            .map(|key| key.expose_secret().to_owned())
            .unwrap_or_default();
        if !section.is_given(KEY) {
            let problem = Problem::new(format!("is missing; {name} needs one"));
            section.fail_because_of(
                "auth.algorithm",
                KEY,
                problem.allowed("{ file = \"…\" } with a public key in PEM"),
            );
        } else if !pem.is_empty() && !algorithm.is_key(&pem) {
            let problem = Problem::new(format!("is not a public key of {name}"));
            section.fail(
                KEY,
                problem.allowed("PEM that begins with -----BEGIN PUBLIC KEY-----"),
            );
        }
        Verifier::PublicKey { algorithm, pem }
    }
}

/// `auth.algorithm` before its key is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    Hs256,
    PublicKey(PublicKeyAlgorithm),
}

impl PublicKeyAlgorithm {
    /// Its name in a token's header.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::EdDsa => "EdDSA",
            Self::Rs256 => "RS256",
            Self::Es256 => "ES256",
        }
    }

    fn is_key(self, pem: &str) -> bool {
        let parse = match self {
            Self::EdDsa => DecodingKey::from_ed_pem,
            Self::Rs256 => DecodingKey::from_rsa_pem,
            Self::Es256 => DecodingKey::from_ec_pem,
        };
        parse(pem.as_bytes()).is_ok()
    }
}
