#!/usr/bin/env bash
# Installs what the chart builds on into the current cluster: a gateway (Gateway API and Traefik),
# KServe in Standard mode, KEDA and the Prometheus operator. Only KServe is always needed; the others
# go with routing.type gateway, scaling.type keda and monitoring. A platform that has them needs
# nothing of this. The chart is tested on Kubernetes 1.34 with KServe 0.20, Gateway API 1.6,
# Traefik 3.7, KEDA 2.21 and Prometheus operator 0.85.
#
#   k8s/prerequisites.sh [gateway] [kserve] [keda] [monitoring]     (by default all four)
set -euo pipefail

# The Gateway API version that the chart's Traefik implements.
GATEWAY_API=v1.4.1
TRAEFIK_CHART=39.0.8
CERT_MANAGER=v1.17.0
KSERVE=v0.20.0
KEDA_CHART=2.21.0
PROMETHEUS_STACK_CHART=79.5.0

# Release, namespace, chart, version, further arguments.
chart() {
    local release=$1 namespace=$2 chart=$3 version=$4
    shift 4
    helm upgrade --install "$release" "$chart" --version "$version" \
        --namespace "$namespace" --create-namespace --wait --timeout 10m "$@"
}

gateway() {
    kubectl apply --server-side -f \
        "https://github.com/kubernetes-sigs/gateway-api/releases/download/$GATEWAY_API/standard-install.yaml"
    # Gateway `traefik` in namespace `traefik`, open to routes of every namespace, on port 30080.
    chart traefik traefik traefik "$TRAEFIK_CHART" --repo https://traefik.github.io/charts \
        --set providers.kubernetesGateway.enabled=true \
        --set gateway.name=traefik \
        --set gateway.listeners.web.namespacePolicy.from=All \
        --set service.type=NodePort \
        --set ports.web.nodePort=30080
}

kserve() {
    # KServe's webhooks need certificates.
    chart cert-manager cert-manager cert-manager "$CERT_MANAGER" \
        --repo https://charts.jetstack.io --set crds.enabled=true
    chart kserve-crd kserve oci://ghcr.io/kserve/charts/kserve-crd "$KSERVE"
    # No routes of KServe's own: the chart makes them.
    chart kserve kserve oci://ghcr.io/kserve/charts/kserve-resources "$KSERVE" \
        --set kserve.controller.deploymentMode=Standard \
        --set kserve.controller.gateway.disableIngressCreation=true \
        --set kserve.controller.gateway.disableIstioVirtualHost=true
    storage
}

# So that the storage initializer passes the `restricted` pod security standard.
storage() {
    kubectl patch clusterstoragecontainer default --type merge --patch '{"spec": {"container": {
        "securityContext": {"allowPrivilegeEscalation": false, "runAsNonRoot": true,
                            "capabilities": {"drop": ["ALL"]}}}}}'
}

keda() {
    chart keda keda keda "$KEDA_CHART" --repo https://kedacore.github.io/charts
}

monitoring() {
    # Monitors and rules of every release, not only of this one.
    chart monitoring monitoring kube-prometheus-stack "$PROMETHEUS_STACK_CHART" \
        --repo https://prometheus-community.github.io/helm-charts \
        --set prometheus.prometheusSpec.podMonitorSelectorNilUsesHelmValues=false \
        --set prometheus.prometheusSpec.ruleSelectorNilUsesHelmValues=false
}

for part in "${@:-all}"; do
    case $part in
        all) gateway; kserve; keda; monitoring ;;
        gateway | kserve | storage | keda | monitoring) "$part" ;;
        *) echo "$part is none of gateway, kserve, storage, keda, monitoring." >&2; exit 2 ;;
    esac
done
