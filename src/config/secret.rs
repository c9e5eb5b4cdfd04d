//! Secrets: values that reach the code that needs them, and never a log, an error or `config show`.

use std::fmt;

use serde::{Serialize, Serializer};

/// A password, a key, or a URL with one in it. Whatever prints it prints `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The secret itself. The name is long so that it stands out where it is used.
    #[must_use]
    pub fn expose_secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// A `PostgreSQL` URL as it may be shown: with user, host and database, without the password.
///
/// Works on the text, not on a parsed URL: a password with a stray `/` or `@` must not come through because the URL
/// does not parse. All up to the last `@` counts as the user's part, so too much is hidden rather than too little.
pub(super) fn masked_url(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let masked = match rest.rsplit_once('@') {
        Some((user, host)) => match user.split_once(':') {
            Some((user, _password)) => format!("{scheme}://{user}:***@{host}"),
            None => url.to_owned(),
        },
        None => url.to_owned(),
    };
    let Some((address, query)) = masked.split_once('?') else {
        return masked;
    };
    let query: Vec<String> = query
        .split('&')
        .map(|pair| match pair.split_once('=') {
            Some((name, _)) if name.to_ascii_lowercase().contains("pass") => format!("{name}=***"),
            _ => pair.to_owned(),
        })
        .collect();
    format!("{address}?{}", query.join("&"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_never_prints() {
        let secret = Secret::new("hunter2");
        assert_eq!(format!("{secret} {secret:?} {secret:#?}"), "*** *** ***");
        assert_eq!(serde_json::to_string(&secret).unwrap(), r#""***""#);
        assert_eq!(secret.expose_secret(), "hunter2");
    }

    #[test]
    fn a_url_is_shown_without_its_password() {
        for (url, shown) in [
            ("postgres://crm:pa:ss@db/crm", "postgres://crm:***@db/crm"),
            (
                "postgres://crm:p@ss/w@db/crm?sslmode=require",
                "postgres://crm:***@db/crm?sslmode=require",
            ),
            ("postgres://crm@db/crm", "postgres://crm@db/crm"),
            ("postgres://db/crm", "postgres://db/crm"),
            (
                "postgres://db/crm?user=crm&password=pw",
                "postgres://db/crm?user=crm&password=***",
            ),
            ("postgres://:pw@db", "postgres://:***@db"),
        ] {
            assert_eq!(masked_url(url), shown);
        }
    }
}
