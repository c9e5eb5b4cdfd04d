//! The languages of documents.

use super::closed_set;

closed_set!(
    /// A language of documents.
    Locale, "language", {
        /// English.
        English = "en",
        /// Portuguese.
        Portuguese = "pt",
    }
);
