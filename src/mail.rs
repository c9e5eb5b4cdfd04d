//! stub
pub struct Mailer;
impl Mailer {
    pub fn new(_: &crate::config::Mail) -> Result<Self, std::io::Error> {
        Ok(Self)
    }
}
