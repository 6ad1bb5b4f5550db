//! A client for the few calls of the Container Runtime Interface that kprov-node makes.
//!
//! The messages are the part of `runtime.v1` (k8s.io/cri-api, `pkg/apis/runtime/v1/api.proto`) that is used here, with its
//! field numbers; protobuf skips fields it does not know, so the rest is left out and no protobuf compiler is needed.

use std::collections::HashMap;
use std::time::Duration;

use camino::Utf8Path;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_prost::ProstCodec;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[error("container runtime call `{call}` failed")]
pub struct CriError {
    /// The call, such as `PullImage`.
    pub call: &'static str,
    /// What the runtime said.
    #[source]
    pub source: tonic::Status,
}

impl CriError {
    /// Whether asking again can help: not when the runtime understood and refused.
    pub fn is_final(&self) -> bool {
        matches!(
            self.source.code(),
            tonic::Code::InvalidArgument | tonic::Code::Unimplemented
        )
    }
}

/// The messages, by their names in the interface.
mod message {
    use std::collections::HashMap;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusRequest {
        #[prost(bool, tag = "1")]
        pub(super) verbose: bool,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RuntimeCondition {
        #[prost(string, tag = "1")]
        pub(super) r#type: String,
        #[prost(bool, tag = "2")]
        pub(super) status: bool,
        #[prost(string, tag = "4")]
        pub(super) message: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RuntimeStatus {
        #[prost(message, repeated, tag = "1")]
        pub(super) conditions: Vec<RuntimeCondition>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) status: Option<RuntimeStatus>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ImageSpec {
        #[prost(string, tag = "1")]
        pub(super) image: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Image {
        #[prost(string, tag = "1")]
        pub(super) id: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ImageStatusRequest {
        #[prost(message, optional, tag = "1")]
        pub(super) image: Option<ImageSpec>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ImageStatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) image: Option<Image>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PullImageRequest {
        #[prost(message, optional, tag = "1")]
        pub(super) image: Option<ImageSpec>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PullImageResponse {
        #[prost(string, tag = "1")]
        pub(super) image_ref: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerStateValue {
        #[prost(int32, tag = "1")]
        pub(super) state: i32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ContainerFilter {
        #[prost(message, optional, tag = "2")]
        pub(super) state: Option<ContainerStateValue>,
        #[prost(map = "string, string", tag = "4")]
        pub(super) label_selector: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ListContainersRequest {
        #[prost(message, optional, tag = "1")]
        pub(super) filter: Option<ContainerFilter>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Container {
        #[prost(string, tag = "1")]
        pub(super) id: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ListContainersResponse {
        #[prost(message, repeated, tag = "1")]
        pub(super) containers: Vec<Container>,
    }
}

/// `CONTAINER_RUNNING` of the interface.
const RUNNING: i32 = 1;

/// A connection to the container runtime; cheap to clone, reconnects by itself.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
}

impl Cri {
    /// A client of the runtime that listens on the Unix socket `socket`. Connects at the first call.
    pub fn new(socket: &Utf8Path) -> Self {
        let socket = socket.to_owned();
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The authority is required by HTTP/2 and means nothing on a socket.
        let channel = Endpoint::from_static("http://localhost")
            .connect_timeout(Duration::from_secs(5))
            .connect_with_connector_lazy(connect);
        Self { channel }
    }

    async fn call<Q, A>(&self, call: &'static str, path: &'static str, limit: Duration, query: Q) -> Result<A, CriError>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let failed = |source| CriError { call, source };
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        client
            .ready()
            .await
            .map_err(|e| failed(tonic::Status::from_error(Box::new(e))))?;
        let mut request = tonic::Request::new(query);
        request.set_timeout(limit);
        let answer = client.unary(request, PathAndQuery::from_static(path), ProstCodec::default());
        match tokio::time::timeout(limit, answer).await {
            Ok(answer) => Ok(answer.map_err(failed)?.into_inner()),
            Err(_) => Err(failed(tonic::Status::deadline_exceeded(format!(
                "no answer within {}s",
                limit.as_secs()
            )))),
        }
    }

    /// Whether the runtime can run containers (its condition `RuntimeReady`); the text says why not.
    pub async fn ready(&self) -> Result<Result<(), String>, CriError> {
        let answer: message::StatusResponse = self
            .call(
                "Status",
                "/runtime.v1.RuntimeService/Status",
                Duration::from_secs(5),
                message::StatusRequest { verbose: false },
            )
            .await?;
        let conditions = answer.status.map(|s| s.conditions).unwrap_or_default();
        Ok(match conditions.into_iter().find(|c| c.r#type == "RuntimeReady") {
            Some(condition) if condition.status => Ok(()),
            Some(condition) => Err(condition.message),
            None => Err("the runtime reports no condition `RuntimeReady`".into()),
        })
    }

    /// Whether the runtime has the image `reference`.
    pub async fn has_image(&self, reference: &str) -> Result<bool, CriError> {
        let image = Some(message::ImageSpec {
            image: reference.into(),
        });
        let answer: message::ImageStatusResponse = self
            .call(
                "ImageStatus",
                "/runtime.v1.ImageService/ImageStatus",
                Duration::from_secs(20),
                message::ImageStatusRequest { image },
            )
            .await?;
        Ok(answer.image.is_some_and(|i| !i.id.is_empty()))
    }

    /// Pulls the image `reference`; returns the runtime's id of it.
    pub async fn pull_image(&self, reference: &str) -> Result<String, CriError> {
        let image = Some(message::ImageSpec {
            image: reference.into(),
        });
        let answer: message::PullImageResponse = self
            .call(
                "PullImage",
                "/runtime.v1.ImageService/PullImage",
                Duration::from_mins(10),
                message::PullImageRequest { image },
            )
            .await?;
        Ok(answer.image_ref)
    }

    /// How many containers of the pod `namespace/name` run.
    pub async fn running_containers(&self, namespace: &str, pod: &str) -> Result<usize, CriError> {
        let label_selector = HashMap::from([
            ("io.kubernetes.pod.namespace".to_owned(), namespace.to_owned()),
            ("io.kubernetes.pod.name".to_owned(), pod.to_owned()),
        ]);
        let filter = message::ContainerFilter {
            state: Some(message::ContainerStateValue { state: RUNNING }),
            label_selector,
        };
        let answer: message::ListContainersResponse = self
            .call(
                "ListContainers",
                "/runtime.v1.RuntimeService/ListContainers",
                Duration::from_secs(20),
                message::ListContainersRequest { filter: Some(filter) },
            )
            .await?;
        Ok(answer.containers.len())
    }
}
