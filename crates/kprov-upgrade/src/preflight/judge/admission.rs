//! Admission that stands in the way of an upgrade's own writes.

use super::super::Inputs;
use super::super::{RefusedWrite, WebhookKind, WebhookSeen};
use super::Findings;

pub(super) fn webhooks(webhooks: &[WebhookSeen], inputs: &Inputs, findings: &mut Findings) {
    for webhook in webhooks {
        let WebhookSeen {
            kind,
            configuration,
            name,
            intercepts,
            service,
            backends,
        } = webhook;
        let (word, kind) = match kind {
            WebhookKind::Mutating => ("mutating", "MutatingWebhookConfiguration"),
            WebhookKind::Validating => ("validating", "ValidatingWebhookConfiguration"),
        };
        let asked = intercepts.join(", ");
        let message = match backends.len() {
            0 => format!(
                "webhook `{name}` of {kind} `{configuration}` has to be asked about {asked}, and its Service `{service}` has no \
                 ready backend: each such write is refused"
            ),
            1 if inputs.nodes.len() > 1 => format!(
                "webhook `{name}` of {kind} `{configuration}` has to be asked about {asked}, and all backends of its Service \
                 `{service}` are on one machine: while that is drained, each such write may be refused"
            ),
            _ => continue,
        };
        findings.warn(
            format!("webhook/{word}/{configuration}/{name}"),
            message,
            "leave kube-system and Nodes out of it (`namespaceSelector`, `rules`), set `failurePolicy: Ignore`, or run it on \
             several machines with a PodDisruptionBudget",
        );
    }
}

pub(super) fn refused(refused: &[RefusedWrite], findings: &mut Findings) {
    for RefusedWrite { object, message } in refused {
        let name = object.replacen(' ', "/", 1);
        findings.block(
            format!("admission/{name}"),
            format!("admission refuses changes of `{object}`: {message}"),
            "let the webhook or policy that it names leave kprov's objects out",
        );
    }
}
