//! Who may see an event.

use super::kinds::closed_set;

closed_set!(
    /// The eyes that look at a timeline; a reader's role gives it.
    Audience, "audience", {
        /// The contact itself: what is `visible_to_client`.
        Client = "client",
        /// The people of the CRM: what is `visible_to_agent`.
        Agent = "agent",
        /// Services: everything, expired events too where they ask for them.
        Audit = "audit",
    }
);

/// To whom an event shows itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visibility {
    /// Shown to the contact. False by default: an internal event must never leak by omission.
    pub client: bool,
    /// Shown to agents.
    pub agent: bool,
}

impl Default for Visibility {
    fn default() -> Self {
        Self {
            client: false,
            agent: true,
        }
    }
}

impl Visibility {
    /// Whether `audience` may see the event, expiry aside.
    #[must_use]
    pub fn includes(self, audience: Audience) -> bool {
        match audience {
            Audience::Client => self.client,
            Audience::Agent => self.agent,
            Audience::Audit => true,
        }
    }

    /// Whose acknowledgement makes a realtime event delivered: the client's where it may see the
    /// event, else the agent's. `None`: visible to nobody, hence never pending.
    #[must_use]
    pub fn delivered_to(self) -> Option<Audience> {
        match self {
            Self { client: true, .. } => Some(Audience::Client),
            Self { agent: true, .. } => Some(Audience::Agent),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_hidden_from_the_client_unless_somebody_said_otherwise() {
        assert!(!Visibility::default().includes(Audience::Client));
        assert!(Visibility::default().includes(Audience::Agent));
    }

    #[test]
    fn the_client_comes_before_the_agent_and_nobody_is_nobody() {
        let to = |client, agent| Visibility { client, agent }.delivered_to();
        assert_eq!(to(true, true), Some(Audience::Client));
        assert_eq!(to(true, false), Some(Audience::Client));
        assert_eq!(to(false, true), Some(Audience::Agent));
        assert_eq!(to(false, false), None);
    }
}
