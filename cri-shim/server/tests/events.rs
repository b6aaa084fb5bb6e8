//! Events: none is lost, whoever died in between.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is a test")]

mod support;

use std::time::Duration;

use pinion_cri_proto::v1::{self, ContainerEventType};
use support::{Client, Server, pod, shell};

/// Events until none has come for a while.
async fn heard(server: &Server) -> Vec<v1::ContainerEventResponse> {
    let request = v1::GetEventsRequest::default();
    let mut stream =
        server.runtime().await.get_container_events(request).await.unwrap().into_inner();
    let mut heard = Vec::new();
    let quiet = Duration::from_millis(700);
    while let Ok(Ok(Some(event))) = tokio::time::timeout(quiet, stream.message()).await {
        heard.push(event);
    }
    heard
}

fn of(events: &[v1::ContainerEventResponse], id: &str) -> Vec<ContainerEventType> {
    events.iter().filter(|e| e.container_id == id).map(|e| e.container_event_type()).collect()
}

#[tokio::test]
async fn a_restart_swallows_no_event() {
    use ContainerEventType::{ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent};
    let mut server = Server::start().await;
    server.load_image().await;
    let mut client = Client(server.runtime().await);
    let config = pod("events");
    let pod = client.run(&config).await.unwrap();
    let short = client.launch(&pod, &shell("short", "sleep 1; exit 7"), &config).await.unwrap();
    let long = client.launch(&pod, &shell("long", "sleep 1000"), &config).await.unwrap();
    server.crash();
    // It ends while there is no server.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    server.spawn().await;

    let events = heard(&server).await;
    let lived = [ContainerCreatedEvent, ContainerStartedEvent];
    assert_eq!(of(&events, &pod), lived);
    assert_eq!(of(&events, &long), lived);
    let whole = [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent];
    assert_eq!(of(&events, &short), whole);
    let last = events.iter().rfind(|e| e.container_id == short).unwrap();
    let status = last.containers_statuses.iter().find(|c| c.id == short).unwrap();
    assert_eq!(status.exit_code, 7);
    assert_eq!(last.pod_sandbox_status.as_ref().unwrap().id, pod);
    assert!(events.windows(2).all(|pair| pair[0].created_at <= pair[1].created_at));

    // What happens between two readers is told to the second, and nothing twice.
    let mut client = Client(server.runtime().await);
    client.stop(&long, 0).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let events = heard(&server).await;
    assert_eq!(of(&events, &long), [ContainerStoppedEvent]);
    assert_eq!(events.len(), 1);
    client.remove_pod(&pod).await.unwrap();
}
