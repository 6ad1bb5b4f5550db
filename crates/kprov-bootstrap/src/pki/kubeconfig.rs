//! Kubeconfig files, written as JSON, which every reader of YAML reads.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kprov_types::node::{JoinToken, KeyPairPem};
use serde_json::{Map, Value, json};

/// How the server proves itself.
#[derive(Clone, Copy, Debug)]
pub enum Authority<'a> {
    /// By a CA's certificate (PEM) inside the file.
    Inline(&'a str),
    /// By the CA's certificate in a file.
    File(&'a str),
}

/// How the user proves itself.
#[derive(Clone, Copy, Debug)]
pub enum Credentials<'a> {
    /// A client certificate inside the file.
    Inline(&'a KeyPairPem),
    /// A client certificate in files, which clients read again when they change.
    Files {
        /// The certificate's path.
        certificate: &'a str,
        /// The key's path.
        key: &'a str,
    },
    /// A bootstrap token.
    Join(&'a JoinToken),
    /// A bearer token in a file, which clients read again when it changes.
    TokenFile(&'a str),
}

/// A kubeconfig with one cluster, one user and one context.
#[derive(Clone, Copy, Debug)]
pub struct Kubeconfig<'a> {
    /// The cluster's name in the file, and the context's.
    pub cluster: &'a str,
    /// The user's name in the file.
    pub user: &'a str,
    /// `https://host:port`.
    pub server: &'a str,
    /// How the server proves itself.
    pub authority: Authority<'a>,
    /// How the user does.
    pub credentials: Credentials<'a>,
}

impl Kubeconfig<'_> {
    /// The file as a JSON value.
    pub fn to_value(&self) -> Value {
        let Self {
            cluster,
            user,
            server,
            authority,
            credentials,
        } = *self;
        let mut server = Map::from_iter([("server".to_owned(), json!(server))]);
        match authority {
            Authority::Inline(pem) => server.insert("certificate-authority-data".into(), encode(pem)),
            Authority::File(path) => server.insert("certificate-authority".into(), json!(path)),
        };
        let identity = match credentials {
            Credentials::Inline(pair) => json!({
                "client-certificate-data": encode(&pair.certificate),
                "client-key-data": encode(&pair.key),
            }),
            Credentials::Files { certificate, key } => json!({ "client-certificate": certificate, "client-key": key }),
            Credentials::Join(token) => json!({ "token": token.bearer() }),
            Credentials::TokenFile(path) => json!({ "tokenFile": path }),
        };
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": cluster, "cluster": server }],
            "users": [{ "name": user, "user": identity }],
            "contexts": [{ "name": cluster, "context": { "cluster": cluster, "user": user } }],
            "current-context": cluster,
        })
    }

    /// The file as text.
    pub fn render(&self) -> String {
        format!("{:#}\n", self.to_value())
    }
}

fn encode(pem: &str) -> Value {
    json!(STANDARD.encode(pem))
}
