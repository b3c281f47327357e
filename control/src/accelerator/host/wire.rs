//! The messages and calls of the device-plugin API, v1beta1, written from its published definition:
//! names, field numbers and paths are the API's.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use tonic::codegen::http;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// The version of the API.
pub const VERSION: &str = "v1beta1";
/// How long a plugin may take to answer a call.
pub const CALL: Duration = Duration::from_secs(10);
/// How long it may prepare its devices before a start: as long as a kubelet waits for it.
const PREPARE: Duration = Duration::from_secs(30);
/// The largest answer, bytes.
const LARGEST: usize = 4 << 20;

/// What a plugin can do besides.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct DevicePluginOptions {
    /// It wants to be called before each start.
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    /// It knows which devices go well together.
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

/// A plugin registers.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RegisterRequest {
    /// Of the API.
    #[prost(string, tag = "1")]
    pub version: String,
    /// Name of its socket.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    /// `vendor.com/resource`.
    #[prost(string, tag = "3")]
    pub resource_name: String,
    /// What it can do.
    #[prost(message, optional, tag = "4")]
    pub options: Option<DevicePluginOptions>,
}

/// A NUMA node.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct NumaNode {
    /// Its number.
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// Where a device is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct TopologyInfo {
    /// The NUMA nodes it is near.
    #[prost(message, repeated, tag = "1")]
    pub nodes: Vec<NumaNode>,
}

/// A device.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Device {
    /// Its id.
    #[prost(string, tag = "1")]
    pub id: String,
    /// `Healthy` or `Unhealthy`.
    #[prost(string, tag = "2")]
    pub health: String,
    /// Where it is.
    #[prost(message, optional, tag = "3")]
    pub topology: Option<TopologyInfo>,
}

/// All devices of a plugin.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListAndWatchResponse {
    /// They.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

/// Which devices are best for one container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContainerPreferredAllocationRequest {
    /// Those that may be chosen.
    #[prost(string, repeated, tag = "1")]
    pub available_ids: Vec<String>,
    /// Those that have to be.
    #[prost(string, repeated, tag = "2")]
    pub must_include_ids: Vec<String>,
    /// How many.
    #[prost(int32, tag = "3")]
    pub allocation_size: i32,
}

/// Which devices are best.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PreferredAllocationRequest {
    /// Per container.
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerPreferredAllocationRequest>,
}

/// Ids, for one container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeviceIds {
    /// They.
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

/// Ids per container: what is preferred, and what is allocated.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PerContainer {
    /// They.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<DeviceIds>,
}

/// A directory or file for the container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Mount {
    /// There.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Here.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Whether it can only be read.
    #[prost(bool, tag = "3")]
    pub read_only: bool,
}

/// A device node for the container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeviceSpec {
    /// There.
    #[prost(string, tag = "1")]
    pub container_path: String,
    /// Here.
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Of `r`, `w`, `m`.
    #[prost(string, tag = "3")]
    pub permissions: String,
}

/// A device by its CDI name.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CdiDevice {
    /// `vendor.com/class=name`.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// What one container gets.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContainerAllocateResponse {
    /// Variables.
    #[prost(map = "string, string", tag = "1")]
    pub envs: HashMap<String, String>,
    /// Mounts.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
    /// Device nodes.
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceSpec>,
    /// Annotations.
    #[prost(map = "string, string", tag = "4")]
    pub annotations: HashMap<String, String>,
    /// CDI names.
    #[prost(message, repeated, tag = "5")]
    pub cdi_devices: Vec<CdiDevice>,
}

/// What each container gets.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AllocateResponse {
    /// They.
    #[prost(message, repeated, tag = "1")]
    pub containers: Vec<ContainerAllocateResponse>,
}

/// A connection to a plugin.
#[derive(Debug, Clone)]
pub struct Plugin(Channel);

impl Plugin {
    /// Connects to a plugin's socket.
    ///
    /// # Errors
    /// The socket cannot be connected to.
    pub async fn connect(socket: &Path) -> Result<Self, Status> {
        let unreachable = |err: tonic::transport::Error| Status::unavailable(err.to_string());
        let address = format!("unix://{}", socket.display());
        let endpoint = Endpoint::from_shared(address).map_err(unreachable)?;
        let channel = endpoint.connect_timeout(CALL).connect().await;
        Ok(Self(channel.map_err(unreachable)?))
    }

    async fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        self.call_within(CALL, method, request).await
    }

    async fn call_within<Q, A>(
        &self,
        limit: Duration,
        method: &'static str,
        request: Q,
    ) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut grpc = self.grpc();
        let called = async {
            grpc.ready()
                .await
                .map_err(|err| Status::unavailable(err.to_string()))?;
            let path = http::uri::PathAndQuery::from_static(method);
            let codec = ProstCodec::<Q, A>::default();
            grpc.unary(Request::new(request), path, codec).await
        };
        match tokio::time::timeout(limit, called).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "no answer within {} s",
                limit.as_secs()
            ))),
        }
    }

    fn grpc(&self) -> tonic::client::Grpc<Channel> {
        tonic::client::Grpc::new(self.0.clone()).max_decoding_message_size(LARGEST)
    }

    /// `GetDevicePluginOptions`.
    ///
    /// # Errors
    /// The plugin is gone, refuses, or does not answer in time.
    pub async fn options(&self) -> Result<DevicePluginOptions, Status> {
        self.call("/v1beta1.DevicePlugin/GetDevicePluginOptions", ())
            .await
    }

    /// `ListAndWatch`: all devices, again at each change.
    ///
    /// # Errors
    /// The plugin is gone, refuses, or does not answer in time.
    pub async fn watch(&self) -> Result<Streaming<ListAndWatchResponse>, Status> {
        let mut grpc = self.grpc();
        let called = async {
            grpc.ready()
                .await
                .map_err(|err| Status::unavailable(err.to_string()))?;
            let path = http::uri::PathAndQuery::from_static("/v1beta1.DevicePlugin/ListAndWatch");
            let codec = ProstCodec::<(), ListAndWatchResponse>::default();
            grpc.server_streaming(Request::new(()), path, codec).await
        };
        match tokio::time::timeout(CALL, called).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("the devices are not listed")),
        }
    }

    /// `GetPreferredAllocation`.
    ///
    /// # Errors
    /// The plugin is gone, refuses, or does not answer in time.
    pub async fn prefer(
        &self,
        request: PreferredAllocationRequest,
    ) -> Result<PerContainer, Status> {
        self.call("/v1beta1.DevicePlugin/GetPreferredAllocation", request)
            .await
    }

    /// `Allocate`.
    ///
    /// # Errors
    /// The plugin is gone, refuses, or does not answer in time.
    pub async fn allocate(&self, request: PerContainer) -> Result<AllocateResponse, Status> {
        self.call("/v1beta1.DevicePlugin/Allocate", request).await
    }

    /// `PreStartContainer`.
    ///
    /// # Errors
    /// The plugin is gone, refuses, or does not answer in time.
    pub async fn pre_start(&self, request: DeviceIds) -> Result<(), Status> {
        self.call_within(PREPARE, "/v1beta1.DevicePlugin/PreStartContainer", request)
            .await
    }
}
