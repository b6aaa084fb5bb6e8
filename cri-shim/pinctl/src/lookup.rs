//! From what a person types (id, prefix or name) to one pod or container.

use crate::connect::Node;
use crate::error::Error;
use pinion_cri_proto::v1::{Container, ListContainersRequest, ListPodSandboxRequest, PodSandbox};

/// A pod or a container.
#[derive(Debug)]
pub(crate) enum Target {
    Pod(PodSandbox),
    Container(Container),
}

const HINT: &str = "`pinctl pods` and `pinctl ps -a` list what there is";

/// All containers, running or not.
pub(crate) async fn containers(node: &mut Node) -> Result<Vec<Container>, Error> {
    let request = ListContainersRequest::default();
    let answer = node.runtime.list_containers(request).await;
    Ok(answer.map_err(Error::call("listing containers"))?.into_inner().containers)
}

/// All pods.
pub(crate) async fn pods(node: &mut Node) -> Result<Vec<PodSandbox>, Error> {
    let request = ListPodSandboxRequest::default();
    let answer = node.runtime.list_pod_sandbox(request).await;
    Ok(answer.map_err(Error::call("listing pods"))?.into_inner().items)
}

/// The one container meant by an id, a prefix of one, or a name.
pub(crate) async fn container(node: &mut Node, given: &str) -> Result<Container, Error> {
    let all = containers(node).await?;
    let found = choose(given, all, |c| (&c.id, name_of(c)))?;
    found.ok_or_else(|| Error::Unknown { what: "container", given: given.to_owned(), hint: HINT })
}

/// The one pod or container meant; a pod wins over a container of the same name.
pub(crate) async fn target(node: &mut Node, given: &str) -> Result<Target, Error> {
    let pods = pods(node).await?;
    if let Some(pod) =
        choose(given, pods, |p| (&p.id, p.metadata.as_ref().map_or("", |m| m.name.as_str())))?
    {
        return Ok(Target::Pod(pod));
    }
    let containers = containers(node).await?;
    match choose(given, containers, |c| (&c.id, name_of(c)))? {
        Some(container) => Ok(Target::Container(container)),
        None => {
            Err(Error::Unknown { what: "pod or container", given: given.to_owned(), hint: HINT })
        }
    }
}

fn name_of(container: &Container) -> &str {
    container.metadata.as_ref().map_or("", |m| m.name.as_str())
}

/// An exact id, else an exact name, else a prefix of an id; more than one is an error.
fn choose<T>(
    given: &str,
    mut all: Vec<T>,
    keys: impl Fn(&T) -> (&String, &str),
) -> Result<Option<T>, Error> {
    if given.is_empty() {
        return Ok(None);
    }
    let matches = |test: &dyn Fn(&String, &str) -> bool| -> Vec<usize> {
        let fits = |t: &T| {
            let (id, name) = keys(t);
            test(id, name)
        };
        all.iter().enumerate().filter(|(_, t)| fits(t)).map(|(i, _)| i).collect()
    };
    let mut found = matches(&|id, _| id == given);
    if found.is_empty() {
        found = matches(&|_, name| name == given);
    }
    if found.is_empty() {
        found = matches(&|id, _| id.starts_with(given));
    }
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(all.swap_remove(*one))),
        many => Err(Error::Ambiguous {
            given: given.to_owned(),
            found: many.iter().map(|i| crate::output::short(keys(&all[*i]).0)).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(given: &str) -> Result<Option<String>, Error> {
        let all = vec![
            ("abc1".to_owned(), "web".to_owned()),
            ("abd2".to_owned(), "db".to_owned()),
            ("web9".to_owned(), "x".to_owned()),
        ];
        choose(given, all, |(id, name)| (id, name.as_str())).map(|o| o.map(|(id, _)| id))
    }

    #[test]
    fn a_name_wins_over_a_prefix_of_an_id() {
        assert_eq!(pick("web").unwrap().as_deref(), Some("abc1"));
    }

    #[test]
    fn a_prefix_must_be_unique() {
        assert_eq!(pick("abd").unwrap().as_deref(), Some("abd2"));
        assert!(matches!(pick("ab"), Err(Error::Ambiguous { .. })));
        assert_eq!(pick("zz").unwrap(), None);
        assert_eq!(pick("").unwrap(), None);
    }
}
