//! The stream of events that hangs, breaks off and comes back.

use super::*;

async fn next(events: &mut EventStream) -> EngineEvent {
    tokio::time::timeout(WATCHDOG, events.next())
        .await
        .expect("no event in time")
}

/// The next event of one container, counting the markers before it.
async fn next_of(events: &mut EventStream, id: &str) -> (usize, String) {
    let mut markers = 0;
    loop {
        match next(events).await {
            EngineEvent::Resynchronise => markers += 1,
            EngineEvent::Container(event) if event.container_id == id => {
                return (markers, event.action);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn events_between_two_streams_are_delivered_once() {
    let mut proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    let (_owned, id) = created("exit 7").await;
    assert_eq!(next_of(&mut events, &id).await, (0, "create".to_owned()));
    proxy.go_down();
    // Lives and dies while nobody listens.
    direct().start(&id).await.unwrap();
    assert_eq!(direct().wait(&id, WATCHDOG).await.unwrap(), 7);
    proxy.bring_up().unwrap();
    let mut markers = 0;
    let mut actions = Vec::new();
    while actions.last().map(String::as_str) != Some("die") {
        let (seen, action) = next_of(&mut events, &id).await;
        markers += seen;
        actions.push(action);
    }
    assert_eq!(markers, 1, "one marker per subscription");
    // Docker's own connect event may stand between, the container's are these, each once.
    assert_eq!(actions, ["start", "die"]);
    // Cut again: nothing is delivered a second time.
    proxy.cut_all();
    loop {
        match next(&mut events).await {
            EngineEvent::Resynchronise => break,
            EngineEvent::Container(event) => assert_ne!(event.container_id, id),
            EngineEvent::Network(_) => {}
        }
    }
    direct().remove(&id, true).await.unwrap();
    assert_eq!(next_of(&mut events, &id).await, (0, "destroy".to_owned()));
}

#[tokio::test]
async fn the_exit_code_and_name_are_read_from_the_event() {
    let docker = direct();
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    let (owned, id) = created("exit 7").await;
    docker.start(&id).await.unwrap();
    let died = loop {
        match next(&mut events).await {
            EngineEvent::Container(event) if event.container_id == id && event.action == "die" => {
                break event;
            }
            _ => {}
        }
    };
    assert_eq!(died.exit_code(), Some(7));
    assert_eq!(died.name(), owned.0);
}

#[tokio::test]
async fn a_stream_that_hangs_is_found_out_by_a_ping() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    proxy.spoil("/_ping", Fault::Hang, 1);
    // Nothing closes the stream; only the unanswered ping can end it.
    loop {
        if next(&mut events).await == EngineEvent::Resynchronise {
            break;
        }
    }
    let subscriptions = proxy
        .requests()
        .iter()
        .filter(|line| line.contains("/events"))
        .count();
    assert_eq!(subscriptions, 2);
}

/// One container's event must not keep those of the others from being read, for ever: each new
/// subscription begins before it again.
#[tokio::test]
async fn an_event_of_any_length_is_passed_over() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    let event = |id: &str, label: &str| {
        format!(
            r#"{{"Type":"container","Action":"die","Actor":{{"ID":"{id}","Attributes":{{"label":"{label}"}}}},"timeNano":4000000000000000000}}"#
        )
    };
    let long = event("long", &"x".repeat(3 << 20));
    let odd = event(&"y".repeat(5000), "");
    let lines = format!("{long}\n{odd}\n{}\n", event("short", ""));
    proxy.spoil("/events", chunked(&lines), 1);
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    // For the one that was left out.
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    let EngineEvent::Container(event) = next(&mut events).await else {
        panic!("the event after the long one");
    };
    assert_eq!(event.container_id, "short");
}

#[tokio::test]
async fn an_engine_whose_events_break_off_is_asked_less_and_less() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    proxy.spoil("/events", chunked("garbage\n"), usize::MAX);
    let mut events = docker.events(64);
    let reading = async {
        loop {
            next(&mut events).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), reading).await;
    let asked = proxy.requests();
    let asked = asked.iter().filter(|line| line.contains("/events")).count();
    // After 0, 0.1, 0.3, 0.7 and 1.5 seconds.
    assert!((2..=6).contains(&asked), "asked {asked} times");
}
