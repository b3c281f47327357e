//! Which node a command is about: its configuration, and how its agent is reached over the real RPC.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::de::DeserializeOwned;

use super::exit::Problem;
use crate::rpc::{self, Client, ClientCurve, ClientError, KeyPair, PublicKey, Value};

/// The configuration of the node. Without a name it is looked for in its places.
#[derive(Debug, Clone, Args)]
pub struct Source {
    /// The configuration file [default: agent.toml in the working directory, in ~/.config/backend.ai or in
    /// /etc/backend.ai].
    #[arg(
        short = 'f',
        long,
        global = true,
        value_name = "FILE",
        visible_alias = "config-path"
    )]
    pub config: Option<PathBuf>,
    /// The node is on its own: no etcd, no bus, no manager, and the RPC on the loopback address. Only a file that
    /// is named is read then.
    #[arg(long, global = true)]
    pub standalone: bool,
}

impl Source {
    /// How the configuration is loaded for the mode that was asked for.
    pub fn options(&self) -> config::LoadOptions {
        config::LoadOptions::of_this_process(self.config.clone(), self.standalone)
    }

    /// The configuration as far as a command beside the agent needs it: where that of a cluster is not
    /// whole, that of a node on its own will do. A file that was found is never passed over: its faults
    /// are told, as values of our own would be those of another node. The node is another user's, perhaps.
    pub fn load(&self) -> Result<config::Loaded, Problem> {
        let mut options = self.options();
        options.only_looks = true;
        load(options).map_err(Problem::from)
    }
}

fn load(mut options: config::LoadOptions) -> Result<config::Loaded, config::Errors> {
    match config::load(&options) {
        // Commands open no listener.
        Err(config::Errors::Unresolved { loaded, .. }) => Ok(*loaded),
        // A node on its own looks into no places, so it is told what was found in them.
        Err(_) if !options.standalone => {
            let places = config::candidates(&*options.environment, &*options.host);
            let found = places.into_iter().find(|place| place.is_file());
            options.explicit = options.explicit.or(found);
            options.standalone = true;
            config::load(&options)
        }
        loaded => loaded,
    }
}

/// Where the agent listens, and the keys when it asks for them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub struct Connection {
    /// The agent's RPC address [default: what the configuration says, else 127.0.0.1:6001].
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT",
        env = "BAI_AGENT_ADDRESS"
    )]
    pub address: Option<String>,
    /// Our key pair (a secret key file), for an agent that authenticates its callers [default: the agent's own of
    /// the configuration, which it accepts on its own host, unless --address is given].
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        requires = "agent_key",
        env = "BAI_AGENT_KEYPAIR"
    )]
    pub keypair: Option<PathBuf>,
    /// The agent's public key file [default: likewise].
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        requires = "keypair",
        env = "BAI_AGENT_PUBLIC_KEY"
    )]
    pub agent_key: Option<PathBuf>,
    /// How long to wait for the agent to answer at all, in seconds.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub connect_timeout: u64,
}

/// The way to an agent, with all questions of the command line and the configuration answered.
#[derive(Debug)]
pub struct Way {
    address: String,
    curve: Option<ClientCurve>,
    patience: Duration,
}

/// A connected agent.
#[derive(Debug)]
pub struct Agent {
    client: Client,
    address: String,
}

impl Connection {
    fn keys(&self, configured: Option<&config::Config>) -> Result<Option<ClientCurve>, Problem> {
        if let (Some(pair), Some(agent)) = (&self.keypair, &self.agent_key) {
            return Ok(Some(ClientCurve {
                pair: KeyPair::from_file(pair).map_err(|err| Problem::Usage(err.into()))?,
                node: PublicKey::from_file(agent).map_err(|err| Problem::Usage(err.into()))?,
            }));
        }
        let Some(files) = configured.and_then(|config| config.agent.rpc_auth.as_ref()) else {
            return Ok(None);
        };
        // On its own host the agent lets its own key in.
        let pair = KeyPair::from_file(&files.agent_keypair).map_err(|err| {
            let remedy = "this node's agent asks for a key; run this as root, or name your keys (--keypair, --agent-key)";
            Problem::Usage(anyhow::Error::new(err).context(remedy))
        })?;
        let node = pair.public;
        Ok(Some(ClientCurve { pair, node }))
    }

    /// The way to the agent of the node that `source` configures.
    pub fn way(&self, source: &Source) -> Result<Way, Problem> {
        let (address, curve) = match &self.address {
            Some(address) => (address.clone(), self.keys(None)?),
            None => {
                let config = source.load()?.config;
                let listen = &config.agent.rpc_listen_addr;
                let address = match listen.host.as_str() {
                    // A wildcard is where the agent listens, not where one can connect to.
                    "" | "0.0.0.0" | "::" => format!("127.0.0.1:{}", listen.port),
                    host => format!("{host}:{}", listen.port),
                };
                (address, self.keys(Some(&config))?)
            }
        };
        Ok(Way {
            address,
            curve,
            patience: Duration::from_secs(self.connect_timeout),
        })
    }
}

impl Way {
    /// Opens a connection and makes sure that an agent answers on it.
    pub async fn open(&self) -> Result<Agent, Problem> {
        self.reach().await.map_err(|source| self.told(source))
    }

    /// The same, for those who know more of an agent that does not answer.
    pub async fn reach(&self) -> Result<Agent, ClientError> {
        let address = self.address.clone();
        let client = Client::connect(&address, self.curve.as_ref(), self.patience).await?;
        Ok(Agent { client, address })
    }

    /// Why there is no connection, and what to look at.
    pub fn told(&self, source: ClientError) -> Problem {
        let remedy = if self.curve.is_some() {
            "are the address and both keys (--keypair, --agent-key) right? The agent takes its own pair only where that file was private (chmod 600) when it started"
        } else {
            "is --address right, and does the agent ask for no key (--keypair, --agent-key)?"
        };
        let address = &self.address;
        match source {
            ClientError::Resolve { .. } | ClientError::Stranger { .. } => {
                Problem::Unavailable(source.into())
            }
            other => Problem::Unavailable(anyhow::Error::new(other).context(format!(
                "no agent answers at {address}; does it run (systemctl status bai-agent), {remedy}"
            ))),
        }
    }
}

impl Agent {
    /// The host it was asked at, as it stands in an address.
    pub fn host(&self) -> &str {
        let address = self.address.strip_prefix("tcp://").unwrap_or(&self.address);
        address.rsplit_once(':').map_or(address, |(host, _)| host)
    }

    /// Calls a method and decodes its reply.
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        args: Vec<Value>,
        deadline: Duration,
    ) -> Result<T, Problem> {
        let reply = self
            .client
            .call(method, args, Vec::new(), deadline)
            .await
            .map_err(|error| match error {
                ClientError::Failure(failure) => Problem::Refused {
                    method: method.to_owned(),
                    class: failure.class,
                    repr: failure.repr,
                },
                other => Problem::Unavailable(
                    anyhow::Error::new(other)
                        .context(format!("the call of {method} to {} failed", self.address)),
                ),
            })?;
        rpc::from_value(reply).map_err(|error| {
            Problem::Other(
                anyhow::Error::new(error)
                    .context(format!("the reply of {method} has an unexpected shape")),
            )
        })
    }
}
