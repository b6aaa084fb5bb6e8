//! `pinctl topology`, `pinctl receipt` and `pinctl info`.

use crate::connect::Node;
use crate::error::Error;
use crate::output::{self, Format};
use pinion_cri_proto::admin::{
    HugepageGrant, InfoRequest, Owner, Receipt, ReceiptsRequest, TopologyRequest,
};
use pinion_cri_proto::v1::StatusRequest;
use pinion_topology::{PageSize, Style};
use serde_json::{Value, json};

/// Draws the machine and who owns what.
pub(crate) async fn topology(node: &mut Node, format: Format) -> Result<(), Error> {
    let answer = node.admin.topology(TopologyRequest {}).await;
    let answer = answer.map_err(Error::call("reading the topology"))?.into_inner();
    let unreadable = |source| Error::Answer { what: "a topology", source };
    if format == Format::Json {
        let machine: Value = serde_json::from_str(&answer.topology_json).map_err(unreadable)?;
        let owners: Vec<Value> = answer.owners.iter().map(owner_json).collect();
        return output::json(&json!({ "topology": machine, "owners": owners }));
    }
    let machine = serde_json::from_str(&answer.topology_json).map_err(unreadable)?;
    let owners = answer.owners.iter().map(ownership).collect::<Result<Vec<_>, _>>()?;
    let colour = std::io::IsTerminal::is_terminal(&std::io::stdout())
        && std::env::var_os("NO_COLOR").is_none();
    let style = Style { colour, ..Style::default() };
    output::print(&pinion_topology::render_with(&machine, &owners, style))
}

fn owner_json(owner: &Owner) -> Value {
    json!({
        "container_id": owner.container_id,
        "container": owner.container_name,
        "pod": owner.pod_name,
        "namespace": owner.pod_namespace,
        "cpus": owner.cpus,
        "exclusive": owner.exclusive,
        "hugepages": owner.hugepages.iter().map(|g| json!({
            "node": g.node, "page_size": g.page_size, "pages": g.pages,
        })).collect::<Vec<_>>(),
    })
}

fn ownership(owner: &Owner) -> Result<pinion_topology::Ownership, Error> {
    let page = |bytes| {
        let bad = |e| Error::Invalid(format!("piniond sent the page size {bytes}: {e}"));
        PageSize::from_bytes(bytes).map_err(bad)
    };
    let grant = |g: &HugepageGrant| Ok((g.node, page(g.page_size)?, g.pages));
    let bad = |e| Error::Invalid(format!("piniond sent the CPU list {:?}: {e}", owner.cpus));
    Ok(pinion_topology::Ownership {
        name: format!("{}/{}", owner.pod_name, owner.container_name),
        cpus: owner.cpus.parse().map_err(bad)?,
        exclusive: owner.exclusive,
        hugepages: owner.hugepages.iter().map(grant).collect::<Result<_, Error>>()?,
    })
}

/// Shows receipts; none is an error when a pod or container was named.
pub(crate) async fn receipts(
    node: &mut Node,
    format: Format,
    id: Option<String>,
) -> Result<(), Error> {
    let id = match id {
        Some(given) => Some(match crate::lookup::target(node, &given).await? {
            crate::lookup::Target::Pod(pod) => pod.id,
            crate::lookup::Target::Container(container) => container.id,
        }),
        None => None,
    };
    let request = ReceiptsRequest { id: id.unwrap_or_default() };
    let answer = node.admin.receipts(request).await;
    let receipts = answer.map_err(Error::call("reading receipts"))?.into_inner().receipts;
    let unreadable = |source| Error::Answer { what: "a receipt", source };
    if format == Format::Json {
        let all = receipts.iter().map(receipt_json).collect::<Result<Vec<_>, _>>();
        return output::json(&all.map_err(unreadable)?);
    }
    if receipts.is_empty() {
        return output::print("no container runs");
    }
    for receipt in &receipts {
        let parsed: pinion_placement::Receipt =
            serde_json::from_str(&receipt.json).map_err(unreadable)?;
        output::print(&format!(
            "{}/{}/{} ({})",
            receipt.pod_namespace,
            receipt.pod_name,
            receipt.container_name,
            output::short(&receipt.container_id)
        ))?;
        output::print(&parsed.render())?;
    }
    Ok(())
}

fn receipt_json(receipt: &Receipt) -> Result<Value, serde_json::Error> {
    Ok(json!({
        "container_id": receipt.container_id,
        "container": receipt.container_name,
        "pod": receipt.pod_name,
        "namespace": receipt.pod_namespace,
        "receipt": serde_json::from_str::<Value>(&receipt.json)?,
    }))
}

/// Shows what piniond says of itself and its conditions.
pub(crate) async fn info(node: &mut Node, format: Format) -> Result<(), Error> {
    let answer = node.admin.info(InfoRequest {}).await;
    let info = answer.map_err(Error::call("reading the node's information"))?.into_inner();
    let details: Value = serde_json::from_str(&info.json)
        .map_err(|source| Error::Answer { what: "information", source })?;
    let answer = node.runtime.status(StatusRequest { verbose: false }).await;
    let status = answer.map_err(Error::call("reading the status"))?.into_inner();
    let conditions = status.status.unwrap_or_default().conditions;
    if format == Format::Json {
        let conditions: Vec<Value> = conditions
            .iter()
            .map(|c| {
                json!({"type": c.r#type, "status": c.status, "reason": c.reason,
                       "message": c.message})
            })
            .collect();
        return output::json(
            &json!({ "version": info.version, "conditions": conditions, "details": details }),
        );
    }
    let mut rows = vec![vec!["version".to_owned(), info.version]];
    for c in conditions {
        let why =
            if c.message.is_empty() { c.reason } else { format!("{}: {}", c.reason, c.message) };
        let state = if c.status { "yes".to_owned() } else { format!("no ({why})") };
        rows.push(vec![c.r#type, state]);
    }
    if let Value::Object(fields) = details {
        for (key, value) in fields {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            rows.push(vec![key, text]);
        }
    }
    output::table(&["", ""], rows)
}

/// Shows where the node differs from its profile: 0 where it does not, else 1.
pub(crate) async fn check(node: &mut Node, format: Format) -> Result<u8, Error> {
    let answer = node.admin.info(InfoRequest {}).await;
    let info = answer.map_err(Error::call("comparing the node with its profile"))?.into_inner();
    let details: Value = serde_json::from_str(&info.json)
        .map_err(|source| Error::Answer { what: "information", source })?;
    let profile = &details["profile"];
    let drift = profile["drift"].as_array().cloned().unwrap_or_default();
    if format == Format::Json {
        output::json(profile)?;
    } else if drift.is_empty() {
        let path = profile["path"].as_str().unwrap_or_default();
        let declared = profile["present"].as_bool().unwrap_or_default();
        output::print(&if declared {
            format!("the node is as {path} declares it")
        } else {
            format!("nothing is declared: there is no {path}")
        })?;
    } else {
        let field = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let keys = ["kind", "what", "wanted", "found", "repairFailed"];
        let rows = drift.iter().map(|row| keys.map(|key| field(row, key)).to_vec()).collect();
        output::table(&["", "WHAT", "DECLARED", "FOUND", "NOT REPAIRED"], rows)?;
    }
    Ok(u8::from(!drift.is_empty()))
}
