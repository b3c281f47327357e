//! A service behind a real RPC server, with methods that misbehave on demand.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use control::rpc::{
    BoxFuture, Call, CurveServer, Failure, KeyPair, Limits, Server, ServerOptions, Service, Value,
};

/// Answers `ping` and `get_logs` like an agent without kernels, and test-only methods: `echo`,
/// `sleep`, `wait` (until `release_at_once`), `attend` (until its caller is gone), `block`, `boom`, `fail`, `unser`, `big` and others the suites name.
#[derive(Debug)]
pub struct TestService {
    gate: Arc<Semaphore>,
    attempts: Arc<AtomicI64>,
    finished: Arc<AtomicI64>,
}

impl Default for TestService {
    fn default() -> Self {
        Self {
            gate: Arc::new(Semaphore::new(0)),
            attempts: Arc::default(),
            finished: Arc::default(),
        }
    }
}

impl Service for TestService {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Value, Failure>> {
        let (attempts, finished) = (self.attempts.clone(), self.finished.clone());
        let gate = self.gate.clone();
        Box::pin(async move {
            let seconds = match call.args.first() {
                Some(Value::Float(seconds)) => *seconds,
                _ => 0.4,
            };
            let time = Duration::from_secs_f64(seconds);
            match call.method.as_str() {
                "echo" => Ok(call.args.into_iter().next().unwrap_or(Value::Nil)),
                "slow" | "sleep" => {
                    tokio::time::sleep(time).await;
                    Ok("slow-done".into())
                }
                "wait" => {
                    let passed = gate.acquire().await;
                    Ok(passed.is_ok().into())
                }
                "attend" => std::future::pending().await,
                "block" => {
                    // What a handler must not do: keeps a worker of the runtime.
                    std::thread::sleep(time);
                    Ok(Value::Nil)
                }
                "thread" => Ok(thread()),
                "boom" => panic!("the handler's own words"),
                "fail" => Err(Failure::runtime_error("it's broken")),
                "raise_timeout" => Err(Failure::timeout()),
                "raise_cancel" => Err(Failure::bare("CancelledError")),
                "sync_boom" => Err(Failure::value_error("sync boom")),
                "unser" => {
                    let value = Box::new(Value::Nil);
                    Ok(Value::Enum {
                        class: "no module".into(),
                        value,
                    })
                }
                "big" => {
                    let length = call.args.first().and_then(Value::as_i64).unwrap_or(0);
                    let length = usize::try_from(length).unwrap_or(0);
                    Ok(Value::Bin(vec![7; length].into()))
                }
                "attempts" => Ok(attempts.load(Ordering::SeqCst).into()),
                "finish_later" => {
                    tokio::time::sleep(time).await;
                    finished.fetch_add(1, Ordering::SeqCst);
                    Ok(Value::Nil)
                }
                "finished" => Ok(finished.load(Ordering::SeqCst).into()),
                _ => catalogued(call, &attempts),
            }
        })
    }

    fn ends_with_its_caller(&self, method: &str) -> bool {
        method == "attend"
    }

    fn answers_at_once(&self, method: &str) -> bool {
        method == "ping" || method.ends_with("_at_once")
    }

    fn answer_at_once(&self, call: Call) -> Result<Value, Failure> {
        match call.method.as_str() {
            "thread_at_once" => Ok(thread()),
            "release_at_once" => {
                self.gate.add_permits(1);
                Ok(Value::Nil)
            }
            "boom_at_once" => panic!("the handler's own words"),
            _ => catalogued(call, &self.attempts),
        }
    }
}

/// Name of the thread this runs on.
fn thread() -> Value {
    std::thread::current().name().unwrap_or_default().into()
}

fn catalogued(call: Call, attempts: &AtomicI64) -> Result<Value, Failure> {
    let (method, mut arguments) = call.bind()?;
    match method.name {
        "ping" => Ok(arguments.take("msg")),
        "get_logs" => Err(Failure::key_error_uuid(arguments.uuid("kernel_id")?)),
        "create_local_network" => {
            if attempts.fetch_add(1, Ordering::SeqCst) < 2 {
                return Err(Failure::runtime_error("not yet"));
            }
            Ok(Value::Nil)
        }
        "gather_hwinfo" => Ok(hardware()),
        _ => Err(Failure::new("NotImplementedError", method.name)),
    }
}

/// What the agent of the captures answered.
fn hardware() -> Value {
    Value::map([
        (
            "cuda",
            Value::map([
                ("status", "healthy".into()),
                ("status_info", Value::Nil),
                (
                    "metadata",
                    Value::map([("driver_version", "550.54"), ("gpu_count", "8")]),
                ),
            ]),
        ),
        (
            "rocm",
            Value::map([
                ("status", "unavailable".into()),
                ("status_info", "driver is not loaded".into()),
                ("metadata", Value::Map(Vec::new())),
            ]),
        ),
    ])
}

/// Who has keys.
#[derive(Debug)]
pub struct Keys {
    /// The server.
    pub agent: KeyPair,
    /// Whom it lets in.
    pub manager: KeyPair,
    /// Somebody else.
    pub stranger: KeyPair,
}

/// As [`start`], with fresh keys, on a machine where only the agent can read its own.
pub async fn start_with_keys(limits: Limits) -> (Server, Keys) {
    let keys = Keys {
        agent: KeyPair::generate(),
        manager: KeyPair::generate(),
        stranger: KeyPair::generate(),
    };
    let curve = CurveServer {
        pair: keys.agent.clone(),
        manager: keys.manager.public,
        own_is_private: true,
    };
    (start(Some(curve), limits).await, keys)
}

/// Starts a server for a [`TestService`] on a loopback port of the system's choice.
pub async fn start(curve: Option<CurveServer>, limits: Limits) -> Server {
    let options = ServerOptions {
        address: "127.0.0.1:0".to_owned(),
        curve,
        limits,
    };
    Server::bind(options, Arc::new(TestService::default()))
        .await
        .expect("a loopback port can be bound")
}
