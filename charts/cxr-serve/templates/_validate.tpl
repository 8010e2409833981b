{{/* Refuses what would be ignored silently or could not work, and says what to do instead. */}}
{{- define "cxr.validate" -}}
{{- include "cxr.validate.refused" . -}}
{{- include "cxr.validate.values" . -}}
{{- include "cxr.validate.portal" . -}}
{{- include "cxr.validate.cluster" . -}}
{{- end }}

{{/* Fields of KServe that do nothing in Standard mode, or that would fight with this chart. */}}
{{- define "cxr.refusedValues" -}}
canaryTrafficPercent: Standard mode ignores it. Set canary.enabled and canary.weight; the routes split the requests.
minReplicas: KServe would reset the autoscaler's replicas with it. Set scaling.minReplicas.
maxReplicas: KServe would scale beside the autoscaler. Set scaling.maxReplicas.
scaleTarget: KServe would scale beside the autoscaler. Set scaling.hpa.cpuUtilization or scaling.keda.inFlightPerReplica.
scaleMetric: KServe would scale beside the autoscaler. Set scaling.type.
containerConcurrency: Standard mode ignores it. The server queues requests itself; scaling.keda adds replicas.
timeout: Standard mode ignores it. Set server.requestTimeout.
batcher: it speaks KServe V1 only and hides the server's own protocols. Send several images in one request.
logger: it would copy the images of every request to another service.
replicaCount: KServe owns the Deployment. Set scaling.replicas.
{{- end }}

{{/* Annotations likewise, by their beginning. */}}
{{- define "cxr.refusedAnnotations" -}}
autoscaling.knative.dev/: Standard mode ignores it. Set the values under scaling.
serving.knative.dev/: Standard mode ignores it. Set the values under rollout and canary.
queue.sidecar.serving.knative.dev/: Standard mode has no queue proxy.
serving.kserve.io/deploymentMode: this chart needs Standard mode and sets it.
serving.kserve.io/autoscalerClass: the chart sets it. Set scaling.type.
serving.kserve.io/metric: KServe would scale beside the autoscaler. Set scaling.type.
serving.kserve.io/targetUtilizationPercentage: KServe would scale beside the autoscaler. Set scaling.hpa.cpuUtilization.
serving.kserve.io/enable-tag-routing: Standard mode ignores it. Set canary.header.
{{- end }}

{{- define "cxr.validate.refused" -}}
{{- range $key, $advice := include "cxr.refusedValues" . | fromYaml -}}
{{- if hasKey $.Values $key -}}
{{- fail (printf "\n%s: %s" $key $advice) -}}
{{- end -}}
{{- end -}}
{{- range $prefix, $advice := include "cxr.refusedAnnotations" . | fromYaml -}}
{{- range $key, $_ := $.Values.annotations -}}
{{- if hasPrefix $prefix $key -}}
{{- fail (printf "\nannotations.%s: %s" $key $advice) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range .Values.server.env -}}
{{- if hasPrefix "CXR_" .name -}}
{{- fail (printf "\nserver.env: %s is one of the server's own settings. Set it by its name under server." .name) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "cxr.validate.values" -}}
{{- $v := .Values -}}
{{- if not $v.model.storageUri -}}
{{- fail "\nmodel.storageUri: say where the archive is, for instance --set model.storageUri=s3://models/cxr/1.0" -}}
{{- end -}}
{{- if and (ne $v.model.signature.policy "off") (not $v.model.signature.publicKey) -}}
{{- fail "\nmodel.signature.publicKey: the policy needs a key to check against, for instance --set-file model.signature.publicKey=KEY.pub.pem" -}}
{{- end -}}
{{- if and $v.tracing.enabled (not $v.tracing.endpoint) -}}
{{- fail "\ntracing.endpoint: say where a collector takes OTLP over HTTP, for instance http://collector.monitoring:4318" -}}
{{- end -}}
{{- if and $v.model.credentialsSecret (not $v.serviceAccount.create) -}}
{{- fail "\nmodel.credentialsSecret: KServe finds it through the service account, which serviceAccount.create: false leaves to you. List the Secret in that account's `secrets`, and leave this empty." -}}
{{- end -}}
{{- if and (ne $v.scaling.type "none") (gt (int $v.scaling.minReplicas) (int $v.scaling.maxReplicas)) -}}
{{- fail "\nscaling.maxReplicas: must not be below scaling.minReplicas." -}}
{{- end -}}
{{- if eq $v.scaling.type "keda" -}}
{{- if not $v.scaling.keda.serverAddress -}}
{{- fail "\nscaling.keda.serverAddress: say where Prometheus answers, for instance http://prometheus-operated.monitoring:9090" -}}
{{- end -}}
{{- if and $v.scaling.keda.query (eq $v.scaling.keda.metric "queue") -}}
{{- fail "\nscaling.keda.query: it takes the place of scaling.keda.metric: queue. Leave one of the two at its default." -}}
{{- end -}}
{{- if and $v.scaling.keda.scaleToZero (not $v.scaling.keda.extraTriggers) -}}
{{- fail "\nscaling.keda.scaleToZero: with no replica there are no requests in flight, so nothing would wake the service. Add a trigger that can to scaling.keda.extraTriggers: a query on the gateway's metrics, or times of day (cron)." -}}
{{- end -}}
{{- end -}}
{{- if and (ne $v.routing.type "none") (not $v.routing.host) -}}
{{- fail "\nrouting.host: say under which host name the service is reached." -}}
{{- end -}}
{{- if and $v.routing.grpcHost (eq $v.routing.host $v.routing.grpcHost) -}}
{{- fail "\nrouting.grpcHost: must differ from routing.host; one host name cannot carry REST and gRPC routes." -}}
{{- end -}}
{{- if and (eq $v.routing.type "gateway") (not $v.routing.gateway.parentRefs) -}}
{{- fail "\nrouting.gateway.parentRefs: name the Gateway, for instance [{name: public, namespace: gateways}]" -}}
{{- end -}}
{{- if and (eq $v.routing.type "ingress") $v.networkPolicy.enabled (not $v.networkPolicy.gatewayPeers) -}}
{{- fail "\nnetworkPolicy.gatewayPeers: say where the ingress controller runs, for instance [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: ingress-nginx}}}]" -}}
{{- end -}}
{{- if and (has (toString $v.rollout.maxSurge) (list "0" "0%")) (has (toString $v.rollout.maxUnavailable) (list "0" "0%")) -}}
{{- fail "\nrollout: with maxSurge and maxUnavailable both 0, no pod could ever be replaced. Where nodes have no room for another pod, set rollout.maxUnavailable: 1." -}}
{{- end -}}
{{- if $v.canary.enabled -}}
{{- if ne $v.routing.type "gateway" -}}
{{- fail "\ncanary.enabled: splitting requests by weight needs the Gateway API. Set routing.type: gateway." -}}
{{- end -}}
{{- if not (or $v.canary.storageUri $v.canary.image.tag $v.canary.image.digest) -}}
{{- fail "\ncanary.enabled: the canary would be the same as the first predictor. Set canary.storageUri or canary.image." -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "cxr.validate.portal" -}}
{{- $portal := .Values.portal -}}
{{- if $portal.enabled -}}
{{- if not $portal.database.secret -}}
{{- if or $portal.scaling.enabled (gt (int $portal.replicas) 1) -}}
{{- fail "\nportal.database.secret: SQLite on a volume takes one replica. Name a Secret with the URL of a PostgreSQL database, or leave portal.replicas at 1 and portal.scaling off." -}}
{{- end -}}
{{- end -}}
{{- if and $portal.scaling.enabled (gt (int $portal.scaling.minReplicas) (int $portal.scaling.maxReplicas)) -}}
{{- fail "\nportal.scaling.maxReplicas: must not be below portal.scaling.minReplicas." -}}
{{- end -}}
{{- if and $portal.scaling.enabled (not (dig "requests" "cpu" "" $portal.resources)) -}}
{{- fail "\nportal.resources.requests.cpu: portal.scaling aims at a share of it." -}}
{{- end -}}
{{- if and (ne .Values.routing.type "none") (not $portal.host) -}}
{{- fail "\nportal.host: say under which host name the portal is reached; one of its own, for its API and the service's share paths." -}}
{{- end -}}
{{- if and $portal.host (has $portal.host (list .Values.routing.host .Values.routing.grpcHost)) -}}
{{- fail "\nportal.host: must differ from routing.host and routing.grpcHost; the portal's API and the service's share paths." -}}
{{- end -}}
{{- if ne (empty $portal.auth.oidc.issuer) (empty $portal.auth.oidc.audience) -}}
{{- fail "\nportal.auth.oidc: issuer and audience go together; without an audience any token of the issuer would do." -}}
{{- end -}}
{{- if and $portal.auth.oidc.jwksUrl (not $portal.auth.oidc.issuer) -}}
{{- fail "\nportal.auth.oidc.jwksUrl: needs portal.auth.oidc.issuer." -}}
{{- end -}}
{{- range $portal.env -}}
{{- if hasPrefix "CXR_" .name -}}
{{- fail (printf "\nportal.env: %s is one of the portal's own settings. Set it by its name under portal." .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* What must be installed. Only a real cluster has the aggregator's API: without one, as in
     `helm template`, nothing is known and nothing is asked. */}}
{{- define "cxr.validate.cluster" -}}
{{- if .Capabilities.APIVersions.Has "apiregistration.k8s.io/v1" -}}
{{- $v := .Values -}}
{{- $needed := dict "serving.kserve.io/v1beta1/InferenceService" "KServe, which this chart deploys on" "serving.kserve.io/v1alpha1/ServingRuntime" "KServe's serving runtimes" -}}
{{- if eq $v.scaling.type "keda" -}}
{{- $_ := set $needed "keda.sh/v1alpha1/ScaledObject" "KEDA; or set scaling.type: hpa" -}}
{{- $hpa := include "cxr.fullname" $ -}}
{{- if lookup "autoscaling/v2" "HorizontalPodAutoscaler" $.Release.Namespace $hpa -}}
{{- fail (printf "\nscaling.type: KEDA refuses what another autoscaler scales, and Helm would delete that one too late. Run `kubectl -n %s delete hpa %s` first; the replicas stay." $.Release.Namespace $hpa) -}}
{{- end -}}
{{- end -}}
{{- if eq $v.routing.type "gateway" -}}
{{- $_ := set $needed "gateway.networking.k8s.io/v1/HTTPRoute" "the Gateway API; or set routing.type: ingress" -}}
{{- if $v.routing.grpcHost -}}
{{- $_ := set $needed "gateway.networking.k8s.io/v1/GRPCRoute" "the Gateway API 1.1 or newer; or leave routing.grpcHost empty" -}}
{{- end -}}
{{- end -}}
{{- if $v.monitoring.podMonitor.enabled -}}
{{- $_ := set $needed "monitoring.coreos.com/v1/PodMonitor" "the Prometheus operator; or set monitoring.podMonitor.enabled: false" -}}
{{- end -}}
{{- range $api, $what := $needed -}}
{{- if not ($.Capabilities.APIVersions.Has $api) -}}
{{- fail (printf "\nThe cluster has no %s. Install %s. docs/install.md has tested versions." $api $what) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}
