//! The engine module against the real dockerd: every call, its refusals and its bounds.

use control::docker::{Docker, DockerError, DockerOptions};

async fn engine() -> Docker {
    Docker::connect(&DockerOptions::default())
        .await
        .expect("the tests need a Docker engine; start one or set DOCKER_HOST")
}

#[tokio::test]
async fn the_api_version_is_negotiated_with_the_engine() {
    let docker = engine().await;
    docker.ping().await.unwrap();
    let offered = docker.version().await.unwrap().api_version;
    let (major, minor) = docker.api_version().await.unwrap();
    let newest: (u16, u16) = {
        let (a, b) = offered.split_once('.').unwrap();
        (a.parse().unwrap(), b.parse().unwrap())
    };
    assert!((major, minor) <= newest);
    assert!(docker.info().await.unwrap().server_version.is_some());
}

#[tokio::test]
async fn unknown_objects_are_not_found() {
    let docker = engine().await;
    assert!(
        docker
            .inspect("eng-no-such")
            .await
            .unwrap_err()
            .is_not_found()
    );
    assert!(
        docker
            .inspect_image("eng/no-such:1")
            .await
            .unwrap_err()
            .is_not_found()
    );
    assert!(
        docker
            .inspect_network("eng-no-such")
            .await
            .unwrap_err()
            .is_not_found()
    );
    assert!(
        docker
            .inspect_volume("eng-no-such")
            .await
            .unwrap_err()
            .is_not_found()
    );
    assert!(matches!(
        docker.inspect("../images/json").await.unwrap_err(),
        DockerError::BadName { .. }
    ));
}
