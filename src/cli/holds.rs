//! `timelined holds`: add, list, release.

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Done, Failure, Global, clock, load, open, print};
use crate::domain::{Category, ContactId, HoldId, Subject, TenantId, format_time};
use crate::storage::{Hold, HoldScope};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Keep what is named from being deleted until the hold is released.
    Add(Add),
    /// The holds that are not released, oldest first.
    List {
        /// Only this tenant's.
        #[arg(long)]
        tenant: Option<TenantId>,
    },
    /// Release a hold; the purge goes on with what it kept.
    Release {
        /// The hold.
        id: HoldId,
        /// The hold's tenant.
        #[arg(long)]
        tenant: TenantId,
    },
}

#[derive(Debug, Args)]
pub(super) struct Add {
    /// The tenant; all of it, where neither --contact nor --category is given.
    #[arg(long)]
    tenant: TenantId,
    /// Only this contact.
    #[arg(long, conflicts_with = "category")]
    contact: Option<ContactId>,
    /// Only this category.
    #[arg(long)]
    category: Option<Category>,
    /// Why.
    #[arg(long, default_value = "", hide_default_value = true, value_parser = reason)]
    reason: String,
}

fn reason(text: &str) -> Result<String, String> {
    let most = crate::api::MAX_REASON;
    if text.chars().count() > most {
        return Err(format!("a reason has at most {most} characters"));
    }
    Ok(text.to_owned())
}

pub(super) async fn run(global: &Global, command: &Command) -> Done {
    let config = load(global)?.config;
    let storage = open(&config).await?;
    let store = &storage.retention;
    let now = clock().now();
    let by = Subject::new("command line").expect("a short text");
    let done = match command {
        Command::Add(add) => {
            let scope = match (add.contact, add.category) {
                (Some(contact), _) => HoldScope::Contact(contact),
                (None, Some(category)) => HoldScope::Category(category),
                (None, None) => HoldScope::Tenant,
            };
            let placed = store.place_hold(&add.tenant, scope, &add.reason, &by, now);
            let hold = placed.await?;
            print(global, &hold, || hold.id.to_string())
        }
        Command::List { tenant } => {
            let holds = store.holds(tenant.as_ref()).await?;
            print(global, &json!({ "holds": holds }), || table(&holds))
        }
        Command::Release { id, tenant } => {
            if store.release_hold(tenant, *id, &by, now).await? {
                print(global, &json!({ "released": id }), String::new)
            } else {
                Err(Failure::NotFound(format!(
                    "the tenant {tenant} has no hold {id}; see: timelined holds list"
                )))
            }
        }
    };
    storage.close().await;
    done
}

fn table(holds: &[Hold]) -> String {
    let lines = holds.iter().map(|hold| {
        let kept = match (hold.contact_id, hold.category) {
            (Some(contact), _) => format!("contact {contact}"),
            (None, Some(category)) => format!("category {category}"),
            (None, None) => "everything".to_owned(),
        };
        // Whatever is in a reason, it does not steer the terminal.
        let reason: String = hold.reason.chars().filter(|c| !c.is_control()).collect();
        format!(
            "{}  {}  {}  {kept}  {reason}",
            hold.id,
            format_time(hold.placed_at),
            hold.tenant_id
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}
