//! What the suites of the engine module share: a client of the real engine, names that nobody else has, and
//! containers that go with their test.

use std::process::Command;

use control::docker::{Docker, DockerOptions};

/// The engine of this machine.
pub async fn engine() -> Docker {
    Docker::connect(&DockerOptions::default())
        .await
        .expect("the tests need a Docker engine; start one or set DOCKER_HOST")
}

/// A name that no other test has.
pub fn unique(what: &str) -> String {
    format!("eng-{what}-{}", uuid::Uuid::new_v4().simple())
}

/// The name of a container, which is removed when the test ends, however it ends.
#[derive(Debug)]
pub struct Owned(pub String);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = Command::new("docker")
            .args(["rm", "-f", "-v", &self.0])
            .output();
    }
}
