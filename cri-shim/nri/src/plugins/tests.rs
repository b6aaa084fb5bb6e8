//! Plugins made of the wire format alone, against the real list of plugins.

use std::sync::Mutex as StdMutex;
use std::time::Instant;

use futures::FutureExt;
use pinion_nri_proto::api::{
    ConfigureResponse, ContainerAdjustment, KeyValue, RegisterPluginRequest, StateChangeEvent,
    SynchronizeRequest,
};
use pinion_nri_proto::{RUNTIME, ttrpc};
use prost::Message as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::frame::{
    FROM_PLUGIN, Kind, MUX_HEADER, Message, Streams, TO_PLUGIN, encode, mux_header,
};

/// A node with two containers that notes what it is asked to change.
#[derive(Default)]
struct Node {
    updated: StdMutex<Vec<ContainerUpdate>>,
}

impl State for Node {
    fn all(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        let container = |id: &str| Container { id: id.into(), ..Default::default() };
        (vec![pod("p")], vec![container("one"), container("two")])
    }

    fn update(
        &self,
        updates: Vec<ContainerUpdate>,
        _: Vec<(String, String)>,
    ) -> BoxFuture<'static, Vec<ContainerUpdate>> {
        self.updated.lock().unwrap().extend(updates.clone());
        std::future::ready(Vec::new()).boxed()
    }
}

fn pod(id: &str) -> PodSandbox {
    PodSandbox { id: id.into(), ..Default::default() }
}

fn container(id: &str) -> Container {
    Container { id: id.into(), ..Default::default() }
}

fn config() -> Config {
    Config {
        plugin_dir: "/nonexistent".into(),
        plugin_config_dir: "/nonexistent".into(),
        registration_timeout: Duration::from_secs(5),
        request_timeout: Duration::from_millis(300),
        required: Vec::new(),
    }
}

/// What a plugin does with a call: method and request to an answer; `None` is silence.
type Act = Box<dyn Fn(&str, &[u8]) -> Option<Result<Vec<u8>, (i32, String)>> + Send>;

/// Everything the plugins were called for, in order: `index method`.
type Calls = Arc<StdMutex<Vec<String>>>;

/// Connects a plugin that agrees to everything but what `act` says.
async fn connect(plugins: &Arc<Plugins>, index: &str, calls: &Calls, act: Act) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (index, calls) = (index.to_owned(), calls.clone());
    tokio::spawn(live(theirs, index, calls, act));
    plugins.join(ours, None).await;
}

async fn live(mut socket: UnixStream, index: String, calls: Calls, act: Act) {
    let register = RegisterPluginRequest {
        plugin_name: "test".into(),
        plugin_idx: index.clone(),
        ..Default::default()
    };
    let request = ttrpc::Request {
        service: RUNTIME.into(),
        method: "RegisterPlugin".into(),
        payload: register.encode_to_vec(),
        timeout_nano: 0,
    };
    let message = Message { stream: 1, kind: Kind::Request, payload: request.encode_to_vec() };
    socket.write_all(&encode(FROM_PLUGIN, &message).unwrap()).await.unwrap();
    let mut streams = Streams::default();
    loop {
        let mut header = [0; MUX_HEADER];
        if socket.read_exact(&mut header).await.is_err() {
            return;
        }
        let (connection, length) = mux_header(header).unwrap();
        let mut bytes = vec![0; length];
        socket.read_exact(&mut bytes).await.unwrap();
        for message in streams.take(connection, &bytes).unwrap() {
            if connection != TO_PLUGIN {
                continue;
            }
            let call = ttrpc::Request::decode(message.payload.as_slice()).unwrap();
            calls.lock().unwrap().push(format!("{index} {}", call.method));
            let answer = act(&call.method, &call.payload).unwrap_or_else(|| match &*call.method {
                "Configure" => Ok(ConfigureResponse::default().encode_to_vec()),
                _ => Ok(Vec::new()),
            });
            if answer == Err((0, "silence".into())) {
                continue;
            }
            let response = match answer {
                Ok(payload) => ttrpc::Response { status: None, payload },
                Err((code, message)) => ttrpc::Response {
                    status: Some(ttrpc::Status { code, message }),
                    payload: Vec::new(),
                },
            };
            let payload = response.encode_to_vec();
            let answer = Message { stream: message.stream, kind: Kind::Response, payload };
            if socket.write_all(&encode(TO_PLUGIN, &answer).unwrap()).await.is_err() {
                return;
            }
        }
    }
}

fn agree() -> Act {
    Box::new(|_, _| None)
}

fn only(method: &'static str, answer: Result<Vec<u8>, (i32, String)>) -> Act {
    Box::new(move |called, _| (called == method).then(|| answer.clone()))
}

fn sets(key: &str) -> Vec<u8> {
    let env = vec![KeyValue { key: key.into(), value: "x".into() }];
    let adjust = Some(ContainerAdjustment { env, ..Default::default() });
    CreateContainerResponse { adjust, ..Default::default() }.encode_to_vec()
}

fn silent() -> Result<Vec<u8>, (i32, String)> {
    Err((0, "silence".into()))
}

fn set_up(config: Config) -> (Arc<Plugins>, Calls) {
    (Plugins::new(config, Arc::new(Node::default())), Calls::default())
}

#[tokio::test]
async fn plugins_are_called_by_their_index_whatever_the_order_of_connecting() {
    let (plugins, calls) = set_up(config());
    for index in ["20", "10", "30"] {
        connect(&plugins, index, &calls, agree()).await;
    }
    calls.lock().unwrap().clear();
    plugins.run_pod(&pod("p")).await.unwrap();
    plugins.create(&pod("p"), &container("c")).await.unwrap();
    let calls = calls.lock().unwrap().clone();
    let expected = ["10 RunPodSandbox", "20 RunPodSandbox", "30 RunPodSandbox"];
    assert_eq!(calls[..3], expected);
    assert!(calls[3..].contains(&"10 CreateContainer".to_owned()));
}

#[tokio::test]
async fn a_new_plugin_learns_what_exists() {
    let (plugins, calls) = set_up(config());
    let seen = Arc::new(StdMutex::new(SynchronizeRequest::default()));
    let copy = seen.clone();
    let act: Act = Box::new(move |method, payload| {
        if method == "Synchronize" {
            *copy.lock().unwrap() = SynchronizeRequest::decode(payload).unwrap();
        }
        None
    });
    connect(&plugins, "10", &calls, act).await;
    let seen = seen.lock().unwrap().clone();
    assert_eq!((seen.pods.len(), seen.containers.len(), seen.more), (1, 2, false));
}

#[tokio::test]
async fn a_refusal_is_an_error_with_the_plugin_s_words() {
    let (plugins, calls) = set_up(config());
    connect(&plugins, "10", &calls, only("RunPodSandbox", Err((2, "no room".into())))).await;
    let error = plugins.run_pod(&pod("p")).await.unwrap_err();
    assert_eq!(chain(&error), "NRI plugin 10-test: RunPodSandbox: no room");
    assert_eq!(plugins.names().await, ["10-test"], "saying no is no reason to be dropped");
}

#[tokio::test]
async fn one_that_does_not_answer_is_dropped_unless_it_is_required() {
    let (plugins, calls) = set_up(config());
    connect(&plugins, "10", &calls, only("CreateContainer", silent())).await;
    let began = Instant::now();
    plugins.create(&pod("p"), &container("c")).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(plugins.names().await, Vec::<String>::new());

    let required = Config { required: vec!["test".into()], ..config() };
    let (plugins, calls) = set_up(required);
    let error = plugins.run_pod(&pod("p")).await.unwrap_err();
    assert!(matches!(error, Refused::Missing(_)), "{error}");
    connect(&plugins, "10", &calls, only("CreateContainer", silent())).await;
    plugins.run_pod(&pod("p")).await.unwrap();
    let error = plugins.create(&pod("p"), &container("c")).await.unwrap_err();
    assert!(matches!(error, Refused::Missing(_)), "{error}");
}

#[tokio::test]
async fn adjustments_come_together_or_contradict_each_other() {
    let (plugins, calls) = set_up(config());
    connect(&plugins, "10", &calls, only("CreateContainer", Ok(sets("A")))).await;
    connect(&plugins, "20", &calls, only("CreateContainer", Ok(sets("B")))).await;
    let merged = plugins.create(&pod("p"), &container("c")).await.unwrap();
    assert_eq!(merged.adjust.env.len(), 2);
    connect(&plugins, "30", &calls, only("CreateContainer", Ok(sets("A")))).await;
    let error = plugins.create(&pod("p"), &container("c")).await.unwrap_err();
    assert_eq!(chain(&error), "NRI: plugins 10-test and 30-test both set env A");
}

#[tokio::test]
async fn a_judge_may_reject_the_whole() {
    let (plugins, calls) = set_up(config());
    connect(&plugins, "10", &calls, only("CreateContainer", Ok(sets("A")))).await;
    let verdict = ValidateContainerAdjustmentResponse { reject: true, reason: "not A".into() };
    let judge = only("ValidateContainerAdjustment", Ok(verdict.encode_to_vec()));
    connect(&plugins, "20", &calls, judge).await;
    let error = plugins.create(&pod("p"), &container("c")).await.unwrap_err();
    assert_eq!(error.to_string(), "NRI plugin 20-test rejects the adjustments: not A");
}

#[tokio::test]
async fn older_plugins_are_told_by_state_changes() {
    let (plugins, calls) = set_up(config());
    let seen = Arc::new(StdMutex::new(Vec::new()));
    let copy = seen.clone();
    let act: Act = Box::new(move |method, payload| match method {
        "StartContainer" | "RunPodSandbox" => Some(Err((12, "what?".into()))),
        "StateChange" => {
            let change = StateChangeEvent::decode(payload).unwrap();
            copy.lock().unwrap().push((change.event(), change.container.is_some()));
            None
        }
        _ => None,
    });
    connect(&plugins, "10", &calls, act).await;
    plugins.run_pod(&pod("p")).await.unwrap();
    plugins.start(&pod("p"), &container("c")).await.unwrap();
    let expected = [(Event::RunPodSandbox, false), (Event::StartContainer, true)];
    assert_eq!(*seen.lock().unwrap(), expected);
}

#[tokio::test]
async fn only_events_that_were_subscribed_are_told() {
    let (plugins, calls) = set_up(config());
    let events = 1 << (Event::StopContainer as i32 - 1);
    let act = only("Configure", Ok(ConfigureResponse { events }.encode_to_vec()));
    connect(&plugins, "10", &calls, act).await;
    calls.lock().unwrap().clear();
    plugins.run_pod(&pod("p")).await.unwrap();
    plugins.stop(&pod("p"), &container("c")).await.unwrap();
    assert_eq!(*calls.lock().unwrap(), ["10 StopContainer"]);
    let act = only("Configure", Ok(ConfigureResponse { events: 1 << 20 }.encode_to_vec()));
    connect(&plugins, "20", &calls, act).await;
    assert_eq!(plugins.names().await, ["10-test"], "events that do not exist");
}

#[tokio::test]
async fn nothing_is_made_while_a_plugin_learns_what_exists() {
    let (plugins, calls) = set_up(config());
    let making = plugins.creation().await;
    let (joining, seen) = (plugins.clone(), calls.clone());
    let join = tokio::spawn(async move { connect(&joining, "10", &seen, agree()).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let synchronized = |calls: &Calls| calls.lock().unwrap().iter().any(|c| c.contains("Sync"));
    assert!(!synchronized(&calls), "what is being made is made first");
    drop(making);
    join.await.unwrap();
    assert!(synchronized(&calls));
}
